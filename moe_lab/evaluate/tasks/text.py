"""Tasks cut from prose: the last word of a passage, how a passage goes on, and which translation is a message's own.

cloze        A passage without its last word, as in LAMBADA (arXiv 1606.06031). Difficulty 1: the word is in the passage
             already; 2: it is elsewhere in the corpus, often; 3: seldom or never.
continuation The next sentence among four, as in HellaSwag (arXiv 1905.07830), the others from the same corpus and of
             about the same length. Difficulty 1: from other documents; 2: from the same one; 3: those that share most
             words with the passage.
translation  A message of a program and its translation among four. Difficulty 1: the others are of any catalogue; 2: of
             the same one; 3: those of the same one that share most words with the right one.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_lab.evaluate.tasks.items import CHOICES, DIFFICULTIES, choice, exact
from moe_lab.evaluate.tasks.prose import Corpus, is_translated, messages

LANGUAGES = {"en": "English", "fr": "French", "de": "German"}

_LONGEST = 110  # words of a passage
_SHORTEST = 20  # words before the one that is asked
_OFTEN = 4  # times in the corpus
_CONTEXT = 12  # words before a sentence that is asked, at least
_SENTENCE = (6, 40)  # words
_MESSAGE = (4, 16)  # words
_MESSAGES = 5000  # translations that wrong ones are taken from
_SAMPLE = 60  # texts of which the nearest in length are taken
_SENTENCE_END = re.compile(r"(?<=[^\W\d_]{3}[.!?])\s+(?=[\"«„“]?\w)")
_LAST_WORD = re.compile(r"(.*\s)([^\W\d_]{4,})[.!?]", re.DOTALL)


def cloze(corpus: Corpus, language: str) -> Iterator[dict]:
  """Yields an item for each paragraph that ends with a word of four letters or more."""
  counts = Counter(word for document in corpus.documents for text in document.paragraphs for word in _words(text))
  for document in corpus.documents:
    for paragraph in document.paragraphs:
      found = _LAST_WORD.fullmatch(_shortened(paragraph))
      if not found or len(found[1].split()) < _SHORTEST:
        continue
      before, word = found[1].rstrip(), found[2]
      if word.lower() in _words(before):
        difficulty = "1"
      else:
        difficulty = "2" if counts[word.lower()] > _OFTEN else "3"
      yield exact("cloze", difficulty, language, before, word)


class _Text(NamedTuple):
  """A text that may be among the choices, and where it is from."""

  text: str
  source: str
  document: str
  place: int  # of its paragraph: sentences of one are no wrong answers to each other
  words: frozenset[str]


def continuation(corpus: Corpus, language: str, rng: random.Random) -> Iterator[dict]:
  """Yields items of paragraphs with two sentences or more, the difficulties in turn."""
  sentences, passages = [], []
  for document in corpus.documents:
    for place, paragraph in enumerate(document.paragraphs):
      parts = _SENTENCE_END.split(paragraph)
      of_paragraph = [
        _Text(part, document.source, document.name, place, frozenset(_words(part))) if _fits(part, _SENTENCE) else None
        for part in parts
      ]
      sentences += filter(None, of_paragraph)
      for number in range(1, len(parts)):
        context = " ".join(parts[:number])
        if of_paragraph[number] and _CONTEXT <= len(context.split()) <= _LONGEST:
          passages.append((context, of_paragraph[number]))
          break  # an item a paragraph
  rng.shuffle(passages)
  for number, (context, right) in enumerate(passages):
    difficulty = DIFFICULTIES[number % len(DIFFICULTIES)]
    # Of one collection: another's subjects and manner would tell.
    others = [
      text
      for text in sentences
      if text.source == right.source and (text.document, text.place) != (right.document, right.place)
    ]
    wrong = _wrong(right, others, difficulty, frozenset(_words(context)), rng)
    if wrong:
      yield choice("continuation", difficulty, language, context, right.text, wrong)


def translation(catalogues: Sequence[Path], language: str, rng: random.Random) -> Iterator[dict]:
  """Yields items of the messages of gettext catalogues, the difficulties in turn."""
  pairs, seen = [], set()
  for path in catalogues:
    if path.stem.startswith("iso_"):  # names of countries and languages
      continue
    for place, (original, translated) in enumerate(messages(path)):
      fits = _fits(original, _MESSAGE) and _fits(translated, _MESSAGE) and original[-1:] == translated[-1:]
      if not fits or original == translated or original in seen or translated in seen or not is_translated(translated):
        continue
      if re.search(r"[%\n\t<>{}\\_@=|]", original + translated) or not translated[0].isalnum():
        continue
      seen.update((original, translated))
      pairs.append((original, _Text(translated, "system", path.stem, place, frozenset(_words(translated)))))
  rng.shuffle(pairs)
  texts = [text for _, text in pairs[:_MESSAGES]]
  name = LANGUAGES.get(language, language)
  for number, (original, right) in enumerate(pairs):
    difficulty = DIFFICULTIES[number % len(DIFFICULTIES)]
    wrong = _wrong(right, [text for text in texts if text is not right], difficulty, right.words, rng)
    if wrong:
      yield choice("translation", difficulty, language, f"English: {original}\n{name}:", right.text, wrong)


def _wrong(
  right: _Text, others: list[_Text], difficulty: str, like: frozenset[str], rng: random.Random
) -> list[str] | None:
  """Returns the wrong choices beside a right one, None where there are too few of its length and form."""
  length, begins, ends = len(right.text), right.text[0].isupper(), right.text[-1]
  fit = {}
  for other in others:
    text = other.text
    if difficulty != "3" and (other.document == right.document) != (difficulty == "2"):
      continue
    if 0.6 * length <= len(text) <= length / 0.6 and text[0].isupper() == begins and text[-1] == ends:
      fit[text] = other.words
  fit.pop(right.text, None)
  texts = list(fit)
  if difficulty == "3":
    texts.sort(key=lambda text: -len(fit[text] & like) / (1 + len(fit[text])))
    texts = texts[:_SAMPLE]
  elif len(texts) > _SAMPLE:
    texts = rng.sample(texts, _SAMPLE)
  # The nearest in length, and how many of them are shorter is drawn: length says nothing of which is right.
  texts.sort(key=lambda text: abs(len(text) - length))
  shorter = [text for text in texts if len(text) < length]
  longer = [text for text in texts if len(text) > length]
  wrong = CHOICES - 1
  if min(len(shorter), len(longer)) < wrong:
    return None
  short = rng.randrange(CHOICES)
  return shorter[:short] + longer[: wrong - short]


def _fits(text: str, words: tuple[int, int]) -> bool:
  return words[0] <= len(text.split()) <= words[1] and text[:1].isalnum()


def _shortened(paragraph: str) -> str:
  """Returns the first sentences of a paragraph, of no more than _LONGEST words."""
  kept: list[str] = []
  for sentence in _SENTENCE_END.split(paragraph):
    if kept and len(" ".join([*kept, sentence]).split()) > _LONGEST:
      break
    kept.append(sentence)
  return " ".join(kept)


def _words(text: str) -> list[str]:
  return re.findall(r"[^\W\d_]+", text.lower())
