import json

import pytest

pytest.importorskip("bm25s")

from moe_lab.errors import UserError
from moe_lab.evaluate.passages import CHARACTERS, SHOWN, Passages, cut, holds_item

CAPITALS = {
  "France": "Paris",
  "Peru": "Lima",
  "Kenya": "Nairobi",
  "Norway": "Oslo",
  "Chad": "N'Djamena",
  "Laos": "Vientiane",
}


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "deep").mkdir()
  for land, city in list(CAPITALS.items())[:4]:
    (tmp_path / "deep" / f"{land}.txt").write_text(f"The seat of government of {land} is the city of {city}.")
  lines = [{"text": f"{land} is governed from {city}."} for land, city in list(CAPITALS.items())[4:]]
  (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  (tmp_path / "code.py").write_text("France = 1")  # is no text
  return tmp_path


def test_the_best_passage_stands_next_to_the_question(folder):
  passages = Passages(folder)
  assert passages.number == 6
  found = passages.before("What is the city of government of Kenya?", "Nairobi")
  shown = found.split("\n\n")
  assert shown.pop() == "" and len(shown) == SHOWN and "Nairobi" in shown[-1]
  assert passages.before("Wo liegt Vientiane", "x") == "Laos is governed from Vientiane.\n\n"
  assert passages.before("zzz", "x") == passages.before("?!", "x") == "" and passages.withheld == 0


def test_a_passage_with_the_item_itself_is_withheld_and_counted(folder):
  passages = Passages(folder)
  assert "Paris" not in passages.before("of France is the city of", "Paris")
  assert "Oslo" in passages.before("of Norway is the city of", "Paris")  # the question, without the answer
  for _ in range(3):  # what is asked again, as at another budget, is counted once
    passages.before("of France is the city of", "Paris")
  assert passages.withheld == 1


def test_what_counts_as_the_item_itself():
  passage = "It was a bright cold day in April, and the clocks were striking thirteen. Winston Smith slipped in."
  assert holds_item(passage, "Long before. It was a bright cold day in april and the clocks were", "striking THIRTEEN!")
  assert not holds_item(passage, "It was a bright cold day in May, and the clocks were", "striking thirteen")
  assert not holds_item(passage, "the clocks were", "striking twelve")
  assert not holds_item(passage, "Who slipped?", "Winston")
  assert holds_item(passage, "Something else", "a bright cold day in April, and the clocks")
  assert not holds_item("1234", "12", "34") and not holds_item(passage, "?", "thirteen")


def test_texts_are_cut_where_they_pause():
  paragraphs = [f"{letter * 4} " * 80 for letter in "abc"]  # 400 characters each
  assert [part[0] for part in cut("\n\n".join(paragraphs))] == ["a", "b", "c"]
  sentences = cut("This is a sentence of some words. " * 100)
  assert all(part.endswith(".") and CHARACTERS // 2 <= len(part) <= CHARACTERS for part in sentences[:-1])
  assert "".join(cut("x" * 1500)) == "x" * 1500 and max(map(len, cut("x" * 1500))) == CHARACTERS
  assert cut(" \n") == []
  text = "One two, three. Four\nfive. " * 90
  assert " ".join(cut(text)).split() == text.split()


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("a.txt", b"caf\xe9", "a.txt: wanted a readable UTF-8 file"),
    ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"txt": "x"}', 'a.jsonl, line 1: wanted an object with a text "text"'),
    ("a.py", b"x", "wanted a folder with texts"),
  ],
)
def test_a_folder_that_cannot_be_used_is_a_line(tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=words):
    Passages(tmp_path)
  with pytest.raises(UserError, match="nowhere: wanted a folder"):
    Passages(tmp_path / "nowhere")
