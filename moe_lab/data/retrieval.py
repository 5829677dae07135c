"""The `retrieval` task: facts scattered over filler, asked for later. What is tested is how far attention reaches.

Half of the rows, by chance, are of each kind:

  passkey   `!` and four digits somewhere in the filler; asked for with `?` `!`, and the digits
  multikey  eight pairs of a key and its value, all keys different, each somewhere; asked for with `?`, a key, its value

In training a row asks over and over, each time about anything that has been told before, so that a row teaches a lot.
Held-out rows ask once, at their end: of a multikey row each key in turn, in random order. There a fact lies up to the
whole row back, and accuracy over rows of several lengths (`data.seq_len`) says how far a model retrieves.

After "Landmark Attention" (arXiv 2305.16300) for the passkey, RULER (arXiv 2404.06654) for several keys. Keys, values,
digits and filler are different tokens: nothing but the pair tells a value.
"""

import numpy as np

FILLER, KEYS, VALUES, DIGITS = 32, 64, 64, 10
PLACES = 4  # digits of a passkey
PAIRS = 8
LEAST_LENGTH = 128  # of a row: shorter ones have no room for the facts
ASK_EVERY = 24  # training: tokens of filler between two questions, on average

# Token ids: filler, keys, values, digits, marks.
KEY = FILLER
VALUE = KEY + KEYS
DIGIT = VALUE + VALUES
PASS, ASK = DIGIT + DIGITS, DIGIT + DIGITS + 1
VOCAB_SIZE = ASK + 1

CLASS_NAMES = ("filler", "passkey", "multikey")
_PASSKEY, _MULTIKEY = 1, 2

Fact = tuple[list[int], list[int]]  # what is asked, and the answer


def draw(rng: np.random.Generator, row_length: int, *, training: bool) -> tuple[np.ndarray, np.ndarray]:
  """Draws one row: tokens int32 [row_length] and classes int32 [row_length], indices into CLASS_NAMES.

  The class of a token, as a target, is the kind of question whose answer it is, or "filler".
  """
  kind = _PASSKEY if rng.random() < 0.5 else _MULTIKEY
  facts = _facts(rng, kind)
  asked = [] if training else [facts[i] for i in rng.permutation(len(facts))]
  end = sum(1 + len(question) + len(answer) for question, answer in asked)
  body = row_length - end
  tokens = rng.integers(0, FILLER, row_length, dtype=np.int32)
  classes = np.zeros(row_length, np.int32)
  # In training facts are told early, so that much of the row can ask for them.
  place = _tell(rng, tokens, facts, body // 4 if training else body)
  if training:
    while place + 1 + 1 + PLACES < row_length:
      place += int(rng.integers(0, 2 * ASK_EVERY))
      place = _ask(tokens, classes, facts[rng.integers(len(facts))], place, kind)
  else:
    place = body
    for fact in asked:
      place = _ask(tokens, classes, fact, place, kind)
  return tokens, classes


def generator() -> dict:
  """Returns what the task is, for a run's record."""
  return {"sizes": [FILLER, KEYS, VALUES, DIGITS], "places": PLACES, "pairs": PAIRS, "ask_every": ASK_EVERY}


def _facts(rng: np.random.Generator, kind: int) -> list[Fact]:
  if kind == _PASSKEY:
    return [([PASS], (DIGIT + rng.integers(0, DIGITS, PLACES)).tolist())]
  keys = KEY + rng.choice(KEYS, PAIRS, replace=False)
  values = VALUE + rng.integers(0, VALUES, PAIRS)
  return [([key], [value]) for key, value in zip(keys.tolist(), values.tolist(), strict=True)]


def _tell(rng: np.random.Generator, tokens: np.ndarray, facts: list[Fact], end: int) -> int:
  """Writes each fact at a random place before `end`, none over another; returns the first place after all of them."""
  size = max(len(question) + len(answer) for question, answer in facts)
  # Ordered places with room between them: gaps are drawn, and the facts' own length is added.
  places = np.sort(rng.integers(0, end - size * len(facts) + 1, len(facts))) + size * np.arange(len(facts))
  for place, (question, answer) in zip(places.tolist(), facts, strict=True):
    fact = question + answer
    tokens[place : place + len(fact)] = fact
  return int(places[-1]) + size


def _ask(tokens: np.ndarray, classes: np.ndarray, fact: Fact, place: int, kind: int) -> int:
  """Writes a question and its answer, as far as the row goes; returns the place after it."""
  question, answer = fact
  text = np.array([ASK, *question, *answer], np.int32)[: max(len(tokens) - place, 0)]
  tokens[place : place + len(text)] = text
  classes[place + 1 + len(question) : place + len(text)] = kind
  return place + 1 + len(question) + len(answer)
