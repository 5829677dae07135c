"""The `queries` task: five kinds of question whose answers can be computed, so that compute by kind can be counted.

A row is a run of queries, each after the marker of its kind. Digits stand units first, as sums are worked.

  recall       four pairs of a key and its value, then three times `?`, one of the keys, and its value
  translation  words, `=`, and each word by the dictionary, the last one first
  arithmetic   three digits, `+`, three digits, `=`, and the three digits of the sum modulo 1000
  chain        a digit, two to four functions, `=`, and the digit that they give one after the other: all in one step
  steps        the same, and after `=` every digit on the way: a step a token
  noise        words at random

The dictionary is a fixed random one and the functions are fixed random permutations: both must be learned, in the
weights; keys, sums and digits must be worked from the row. The class of a token, as a target, is the kind whose answer
it is; what is drawn at random in a question is "other", and in noise "noise".
"""

import functools
import hashlib

import numpy as np

WORDS = 64  # of each language
DIGITS = 10
FUNCTIONS = 8
TABLE_SEED = 20_241_125  # the task is the same whatever the run's seed

KINDS = ("recall", "translation", "arithmetic", "chain", "steps", "noise")
CLASS_NAMES = ("other", *KINDS)
PAIRS, ASKS = 4, 3
MIN_WORDS, MAX_WORDS = 2, 5
PLACES = 3
MIN_CHAIN, MAX_CHAIN = 2, 4
MIN_NOISE, MAX_NOISE = 8, 16
# Odds of the next query's kind: a chain has one answer, so that it comes more often; each kind's answers are then about
# a twenty-fifth of the tokens.
ODDS = {"recall": 2, "translation": 2, "arithmetic": 2, "chain": 6, "steps": 2, "noise": 2}

# Token ids: words of one language, of the other, digits, functions, markers in the order of KINDS, punctuation.
FOREIGN = WORDS
DIGIT = 2 * WORDS
FUNCTION = DIGIT + DIGITS
MARKER = FUNCTION + FUNCTIONS
EQUALS, PLUS, ASK = range(MARKER + len(KINDS), MARKER + len(KINDS) + 3)
VOCAB_SIZE = ASK + 1


@functools.cache
def dictionary() -> list[int]:
  """Returns the foreign word, 0..WORDS - 1, of each word."""
  return np.random.Generator(np.random.Philox(TABLE_SEED)).permutation(WORDS).tolist()


@functools.cache
def functions() -> list[list[int]]:
  """Returns FUNCTIONS permutations of the digits."""
  rng = np.random.Generator(np.random.Philox(TABLE_SEED + 1))
  return [rng.permutation(DIGITS).tolist() for _ in range(FUNCTIONS)]


def draw(rng: np.random.Generator, row_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws one row: tokens int32 [row_length] and classes int32 [row_length], indices into CLASS_NAMES."""
  tokens: list[int] = []
  classes: list[int] = []
  odds = np.cumsum([ODDS[kind] for kind in KINDS])
  while len(tokens) < row_length:
    kind = int(np.searchsorted(odds, rng.random() * odds[-1], side="right"))
    query, answered = _QUERIES[KINDS[kind]](rng)
    tokens += [MARKER + kind, *query]
    classes += [0, *(1 + kind if answer else 0 for answer in answered)]
  return np.array(tokens[:row_length], np.int32), np.array(classes[:row_length], np.int32)


def generator() -> dict:
  """Returns what the task is, for a run's record."""
  tables = np.array([*dictionary(), *(digit for function in functions() for digit in function)], "<i4")
  return {
    "words": WORDS,
    "odds": ODDS,
    "lengths": [PAIRS, ASKS, MIN_WORDS, MAX_WORDS, PLACES, MIN_CHAIN, MAX_CHAIN, MIN_NOISE, MAX_NOISE],
    "tables_sha256": hashlib.sha256(tables.tobytes()).hexdigest(),
  }


# Each returns the tokens after the marker, and for each whether it is an answer.
_Query = tuple[list[int], list[bool]]


def _recall(rng: np.random.Generator) -> _Query:
  keys = rng.choice(WORDS, PAIRS, replace=False).tolist()
  values = (FOREIGN + rng.integers(0, WORDS, PAIRS)).tolist()
  query = [token for pair in zip(keys, values, strict=True) for token in pair]
  answered = [False] * len(query)
  for place in rng.permutation(PAIRS)[:ASKS].tolist():
    query += [ASK, keys[place], values[place]]
    answered += [False, False, True]
  return query, answered


def _translation(rng: np.random.Generator) -> _Query:
  words = rng.integers(0, WORDS, int(rng.integers(MIN_WORDS, MAX_WORDS + 1))).tolist()
  answer = [FOREIGN + dictionary()[word] for word in reversed(words)]
  return [*words, EQUALS, *answer], [False] * (len(words) + 1) + [True] * len(answer)


def _arithmetic(rng: np.random.Generator) -> _Query:
  first, second = rng.integers(0, DIGITS**PLACES, 2).tolist()
  digits = [_digits(number) for number in (first, second, (first + second) % DIGITS**PLACES)]
  return [*digits[0], PLUS, *digits[1], EQUALS, *digits[2]], [False] * (2 * PLACES + 2) + [True] * PLACES


def _chain(rng: np.random.Generator) -> _Query:
  question, states = _composition(rng)
  return [*question, EQUALS, states[-1]], [False] * (len(question) + 1) + [True]


def _steps(rng: np.random.Generator) -> _Query:
  question, states = _composition(rng)
  return [*question, EQUALS, *states], [False] * (len(question) + 1) + [True] * len(states)


def _noise(rng: np.random.Generator) -> _Query:
  words = rng.integers(0, WORDS, int(rng.integers(MIN_NOISE, MAX_NOISE + 1))).tolist()
  return words, [True] * len(words)


def _composition(rng: np.random.Generator) -> tuple[list[int], list[int]]:
  """Returns a digit with the functions to apply to it, and the digit after each, as tokens."""
  state = int(rng.integers(0, DIGITS))
  chosen = rng.integers(0, FUNCTIONS, int(rng.integers(MIN_CHAIN, MAX_CHAIN + 1))).tolist()
  question, states = [DIGIT + state, *(FUNCTION + number for number in chosen)], []
  for number in chosen:
    state = functions()[number][state]
    states.append(DIGIT + state)
  return question, states


def _digits(number: int) -> list[int]:
  return [DIGIT + number // DIGITS**place % DIGITS for place in range(PLACES)]


_QUERIES = {
  "recall": _recall,
  "translation": _translation,
  "arithmetic": _arithmetic,
  "chain": _chain,
  "steps": _steps,
  "noise": _noise,
}
