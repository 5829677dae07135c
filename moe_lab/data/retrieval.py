"""The `retrieval` task: facts scattered over filler, asked for later. What is tested is how far attention reaches.

Half of the rows, by chance, are of each kind:

  passkey   `!` and four digits somewhere in the filler; asked for with `?` `!`, and the digits
  multikey  eight pairs of a key and its value, all keys different, each somewhere; asked for with `?`, a key, its value

Filler is one sentence over and over, as the passkey task has it: what is left to learn is the answers. In training
facts are told in a document's first half and asked for over and over in its second, each time one by chance, so that
answers lie far back too and a row teaches a lot. A multikey document has from one pair to all keys, few more often than
many: with eight and more from the start, a small model does not find out that a key's value is the token behind it. A
training row is one document of its whole length as often as two, four or eight equal ones: a batch then holds several
times as many facts. Held-out rows are one document and ask once, at its end: for each of eight keys in turn, in random
order. There a fact lies up to the whole row back, and accuracy over rows of several lengths (`data.seq_len`) says how
far a model retrieves.

After "Landmark Attention" (arXiv 2305.16300) for the passkey, RULER (arXiv 2404.06654) for several keys. Keys, values,
digits and filler are different tokens: nothing but the pair tells a value.
"""

from typing import NamedTuple

import numpy as np

FILLER, KEYS, VALUES, DIGITS = 32, 16, 16, 10
PLACES = 4  # digits of a passkey
PAIRS = 8  # of a held-out row
LEAST_LENGTH = 128  # of a document: shorter ones have no room for the facts
DOCUMENTS = (1, 2, 4, 8)  # training: equal ones in a row, each number as often
ASK_EVERY = 4  # training: tokens of filler between two questions, on average

# Token ids: filler, keys, values, digits, marks.
KEY = FILLER
VALUE = KEY + KEYS
DIGIT = VALUE + VALUES
PASS, ASK = DIGIT + DIGITS, DIGIT + DIGITS + 1
VOCAB_SIZE = ASK + 1

CLASS_NAMES = ("filler", "passkey", "multikey")
_PASSKEY, _MULTIKEY = 1, 2


class Fact(NamedTuple):
  """A question of one token, and the tokens of its answer."""

  question: int
  answer: list[int]

  @property
  def told(self) -> list[int]:
    return [self.question, *self.answer]

  @property
  def asked(self) -> list[int]:
    return [ASK, *self.told]


def draw(rng: np.random.Generator, row_length: int, *, training: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws one row: int32 [row_length] each, its tokens, its documents' numbers from 1 on, and its tokens' classes.

  The class of a token, as a target, is the kind of question whose answer it is, or "filler": an index into CLASS_NAMES.
  """
  count = 1
  if training:
    fitting = [count for count in DOCUMENTS if row_length // count >= LEAST_LENGTH]
    count = fitting[rng.integers(0, len(fitting))]
  segments = 1 + np.minimum(np.arange(row_length) // (row_length // count), count - 1)
  documents = [_document(rng, length, training=training) for length in np.bincount(segments)[1:].tolist()]
  tokens, classes = (np.concatenate(parts) for parts in zip(*documents, strict=True))
  return tokens, segments.astype(np.int32), classes


def _document(rng: np.random.Generator, length: int, *, training: bool) -> tuple[np.ndarray, np.ndarray]:
  """Draws the tokens and classes of one document."""
  kind = _PASSKEY if rng.random() < 0.5 else _MULTIKEY
  tokens = ((rng.integers(0, FILLER) + np.arange(length)) % FILLER).astype(np.int32)
  classes = np.zeros(length, np.int32)
  if training:
    half = length // 2
    facts = _facts(rng, kind, int(KEYS ** rng.random()))
    told = _places(rng, [len(fact.told) for fact in facts], 0, half)
    asked = [facts[i] for i in rng.integers(0, len(facts), half // (ASK_EVERY + 1 + len(facts[0].told)))]
    places = _places(rng, [len(fact.asked) for fact in asked], half, length)
  else:
    facts = _facts(rng, kind, PAIRS)
    asked = [facts[i] for i in rng.permutation(len(facts))]
    places = length - np.cumsum([len(fact.asked) for fact in asked])[::-1]
    told = _places(rng, [len(fact.told) for fact in facts], 0, int(places[0]))
  for fact, place in zip(facts, told, strict=True):
    tokens[place : place + len(fact.told)] = fact.told
  for fact, place in zip(asked, places, strict=True):
    tokens[place : place + len(fact.asked)] = fact.asked
    classes[place + 2 : place + len(fact.asked)] = kind
  return tokens, classes


def generator() -> dict:
  """Returns what the task is, for a run's record."""
  sizes = [FILLER, KEYS, VALUES, DIGITS]
  return {"sizes": sizes, "places": PLACES, "pairs": PAIRS, "ask_every": ASK_EVERY, "documents": DOCUMENTS}


def _facts(rng: np.random.Generator, kind: int, pairs: int) -> list[Fact]:
  if kind == _PASSKEY:
    return [Fact(PASS, (DIGIT + rng.integers(0, DIGITS, PLACES)).tolist())]
  keys = KEY + rng.choice(KEYS, pairs, replace=False)
  values = VALUE + rng.integers(0, VALUES, pairs)
  return [Fact(key, [value]) for key, value in zip(keys.tolist(), values.tolist(), strict=True)]


def _places(rng: np.random.Generator, sizes: list[int], begin: int, end: int) -> np.ndarray:
  """Draws where texts of these sizes go, in their order and none over another."""
  # What is left over is drawn as sorted cuts, and the texts' own lengths are added.
  cuts = np.sort(rng.integers(0, end - begin - sum(sizes) + 1, len(sizes)))
  return begin + cuts + np.cumsum([0, *sizes[:-1]])
