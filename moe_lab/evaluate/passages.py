"""Passages of a folder's texts that may help with a question, found by BM25 (bm25s, arXiv 2407.03618; extra eval).

A passage that holds the test item itself would turn the measurement into one of copying. Such are withheld, and
counted: those that hold the question's last words (all of a short one) and the answer, and those that hold an answer
of `LONG` words or more.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from moe_lab.errors import UserError, require

CHARACTERS = 600  # of a passage, about a hundred words
SHOWN = 3  # passages of an item
_CANDIDATES = 4 * SHOWN  # that are looked at, since some may be withheld
TAIL = 12  # last words of a question by which it is known
LONG = 8  # words that an answer has to have to be known without its question
_TEXTS = (".txt", ".md")


class Passages:
  """Passages that can be searched.

  Attributes:
    number: of them.
    withheld: passages found so far that were held back.
  """

  def __init__(self, folder: Path):
    """Reads and indexes a folder.

    Raises:
      UserError: there is nothing to read in it, something cannot be read, or the extra is not installed.
    """
    require("bm25s", f"--retrieve={folder}", "eval")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    self._passages = [passage for text in _texts(folder) for passage in cut(text)]
    self.number, self.withheld = len(self._passages), 0
    self._found: dict[tuple[str, str], str] = {}
    if not self._passages:
      raise UserError(f"--retrieve={folder}: wanted a folder with texts (.txt, .md or .jsonl) in it")
    self._index = bm25s.BM25()
    self._index.index([words(passage) for passage in self._passages], show_progress=False)

  def before(self, question: str, answer: str) -> str:
    """Returns what to put before a question: at most `SHOWN` passages with words of it, the best one next to it.

    The answer is only used to withhold passages that hold the item itself.
    """
    if (question, answer) not in self._found:
      shown = self._about(question, answer)
      self._found[question, answer] = "".join(passage + "\n\n" for passage in shown[::-1])
    return self._found[question, answer]

  def _about(self, question: str, answer: str) -> list[str]:
    query = words(question)
    if not query:
      return []
    found, scores = self._index.retrieve([query], k=min(_CANDIDATES, self.number), show_progress=False)
    shown = []
    for index, score in zip(found[0].tolist(), scores[0].tolist(), strict=True):
      if score <= 0 or len(shown) == SHOWN:
        break
      if holds_item(self._passages[index], question, answer):
        self.withheld += 1
      else:
        shown.append(self._passages[index])
    return shown


def holds_item(passage: str, question: str, answer: str) -> bool:
  """Returns whether a passage gives away a test item; by words, without regard to case and punctuation."""
  text, tail, end = (f" {' '.join(part)} " for part in (words(passage), words(question)[-TAIL:], words(answer)))
  if not end.strip() or end not in text:
    return False
  return len(words(answer)) >= LONG or (bool(tail.strip()) and tail in text)


def words(text: str) -> list[str]:
  """Returns the words and numbers of a text, in small letters."""
  return re.findall(r"\w+", text.lower())


def cut(text: str) -> list[str]:
  """Returns a text in passages of at most `CHARACTERS`, cut at paragraphs, lines, sentences or words."""
  passages, rest = [], text.strip()
  while len(rest) > CHARACTERS:
    head = rest[: CHARACTERS + 1]
    # The latest place of the best kind that does not leave a short piece.
    at = next((at for mark in ("\n\n", "\n", ". ", " ") if (at := head.rfind(mark)) >= CHARACTERS // 2), CHARACTERS)
    at += head[at : at + 2] == ". "  # the full stop stays
    passages.append(rest[:at].rstrip())
    rest = rest[at:].lstrip()
  return [*passages, rest] if rest else passages


def _texts(folder: Path) -> Iterator[str]:
  """Yields the texts of a folder: each .txt and .md file, and of .jsonl files the "text" of each line."""
  if not folder.is_dir():
    raise UserError(f"--retrieve={folder}: wanted a folder with texts (.txt, .md or .jsonl) in it")
  for path in sorted(folder.rglob("*")):
    if not path.is_file() or path.suffix not in (*_TEXTS, ".jsonl"):
      continue
    try:
      text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"--retrieve: {path}: wanted a readable UTF-8 file ({error})") from None
    if path.suffix in _TEXTS:
      yield text
      continue
    for number, line in enumerate(text.split("\n"), 1):
      if line.strip():
        yield _line_text(line, f"{path}, line {number}")


def _line_text(line: str, place: str) -> str:
  try:
    fields = json.loads(line)
  except ValueError as error:
    raise UserError(f"--retrieve: {place}: not JSON ({error})") from None
  if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
    raise UserError(f'--retrieve: {place}: wanted an object with a text "text"')
  return fields["text"]
