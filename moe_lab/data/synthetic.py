"""Synthetic tasks in which it is known, token by token, whether compute can help.

`difficulty`: a row is a run of segments. A marker token names the segment's kind, then tokens of one alphabet follow:

  easy   two random tokens, then each repeats the one two back: copying
  hard   two random tokens, then each is TABLE[two back, one back]: must be learned, then it can be computed
  noise  random tokens: nothing helps

TABLE is a Latin square, so in every kind each token, and each pair of neighbours in a hard segment, is equally likely
throughout: neither token ids nor a bigram tell the kinds apart or predict anything but the repetition's structure.

`noise`: random tokens only; the floor is log(ALPHABET) nats.

`queries`: questions of several kinds with computable answers (`queries.py`).

`retrieval`: facts to be found again far back (`retrieval.py`).

Rows are drawn when asked for, by (seed, split, index): the position in the stream is one number.
"""

import functools
import hashlib
import json
from collections.abc import Iterator

import grain
import numpy as np

from moe_lab.config.schema import DataConfig
from moe_lab.data import queries, retrieval
from moe_lab.data.iterator import Loader
from moe_lab.data.ngram import Pairs
from moe_lab.data.packing import batches_of_rows
from moe_lab.data.splits import SPLITS
from moe_lab.errors import ConfigError, did_you_mean
from moe_lab.types import Batch

ALPHABET = 24
SHARES = {"easy": 0.4, "hard": 0.2, "noise": 0.4}  # of the tokens that are not "marker"
MIN_SEGMENT, MAX_SEGMENT = 8, 16  # tokens after the marker
TABLE_SEED = 20_240_601  # the task is the same whatever the run's seed
EVAL_ROWS = 1024  # of validation, of test, and of a pass over "train"
PAIR_ROWS = 16_384  # that train_token_pairs yields

# "marker" is what a segment needs and nobody can predict: its marker, and the two tokens a rule starts from.
CLASS_NAMES = ("marker", "easy", "hard", "noise")
TASKS = {  # vocabulary of each
  "difficulty": ALPHABET + len(SHARES),
  "noise": ALPHABET,
  "queries": queries.VOCAB_SIZE,
  "retrieval": retrieval.VOCAB_SIZE,
}
_MODULES = {"queries": queries, "retrieval": retrieval}  # tasks with a file of their own
_MARKER, _EASY, _HARD, _NOISE = range(4)


@functools.cache
def table() -> np.ndarray:
  """Returns int32 [n, n], a random Latin square: every row and every column is a permutation of the alphabet.

  With rows alone permuted, x_t would still depend on x_{t-1}, and the frequencies would drift along a segment. Filled
  a row at a time by random matchings of columns to symbols, which Hall's theorem says can always be completed; a
  shuffled addition table would be a Latin square too, but one with a formula.
  """
  rng = np.random.Generator(np.random.Philox(TABLE_SEED))
  free = np.ones((ALPHABET, ALPHABET), bool)  # [column, symbol]: not used in this column yet
  rows = []
  for _ in range(ALPHABET):
    column_of = np.full(ALPHABET, -1)  # of each symbol, in this row
    for column in rng.permutation(ALPHABET):
      _assign(int(column), free, rng.permutation(ALPHABET), column_of, set())
    row = np.argsort(column_of).astype(np.int32)
    free[np.arange(ALPHABET), row] = False
    rows.append(row)
  return np.stack(rows)


def _assign(column: int, free: np.ndarray, symbols: np.ndarray, column_of: np.ndarray, tried: set[int]) -> bool:
  """Gives `column` a symbol, moving earlier columns to others where needed (Kuhn's augmenting path)."""
  for symbol in symbols:
    if free[column, symbol] and symbol not in tried:
      tried.add(symbol)
      if column_of[symbol] < 0 or _assign(column_of[symbol], free, symbols, column_of, tried):
        column_of[symbol] = column
        return True
  return False


def sample_row(task: str, seed: int, split: str, index: int, row_length: int) -> Batch:
  """Draws one row.

  Validation and test do not depend on the seed, so runs with different seeds are compared on the same rows.

  Returns:
    tokens, segments and classes, int32 [row_length] each; classes are indices into the task's class names: how each
    token, as a target, can be predicted.
  """
  stream = SPLITS.index(split)
  key = np.array([seed % 2**64 if split == "train" else 0, (stream << 56) + index], np.uint64)
  rng = np.random.Generator(np.random.Philox(key=key))
  if task == "retrieval":
    return Batch(*retrieval.draw(rng, row_length, training=split == "train"))
  tokens, classes = _one_document(task, rng, row_length)
  return Batch(tokens, np.ones_like(tokens), classes)


def _one_document(task: str, rng: np.random.Generator, row_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws a row's tokens and classes, of tasks whose rows are one document."""
  if task == "queries":
    return queries.draw(rng, row_length)
  tokens = rng.integers(0, ALPHABET, row_length, dtype=np.int32)
  if task == "noise":
    return tokens, np.full(row_length, _NOISE, np.int32)
  segments = row_length // (MIN_SEGMENT + 1) + 1
  kinds = np.searchsorted(_kind_bounds(), rng.random(segments), side="right").tolist()
  lengths = rng.integers(MIN_SEGMENT, MAX_SEGMENT + 1, segments).tolist()
  # Lists: each token of a rule needs the two before it, and indexing arrays one by one is slow.
  row, classes, rule = tokens.tolist(), [_MARKER] * row_length, _table_lists()
  start = 0
  for kind, length in zip(kinds, lengths, strict=True):
    if start >= row_length:
      break
    row[start] = ALPHABET + kind
    end = min(start + 1 + length, row_length)
    first = min(start + 1 if kind + 1 == _NOISE else start + 3, end)
    classes[first:end] = [kind + 1] * (end - first)
    if kind + 1 == _EASY:
      for t in range(first, end):
        row[t] = row[t - 2]
    elif kind + 1 == _HARD:
      for t in range(first, end):
        row[t] = rule[row[t - 2]][row[t - 1]]
    start = end
  return np.array(row, np.int32), np.array(classes, np.int32)


@functools.cache
def _table_lists() -> list[list[int]]:
  return table().tolist()


@functools.cache
def _kind_bounds() -> np.ndarray:
  """Returns the inner cumulative probabilities of a segment's kind that give SHARES of the tokens."""
  mean = (MIN_SEGMENT + MAX_SEGMENT) / 2
  odds = np.array([share / (mean if name == "noise" else mean - 2) for name, share in SHARES.items()])
  return np.cumsum(odds / odds.sum())[:-1]


class SyntheticData:
  """Rows of a synthetic task. The interface is `loader.Data`."""

  tokenizer = None

  def __init__(self, config: DataConfig):
    self.config = config
    self._task = config.sources[0].partition(":")[2]
    if self._task not in TASKS:
      wanted = " or ".join(f"synthetic:{name}" for name in TASKS)
      raise ConfigError("data.sources", config.sources[0], wanted + did_you_mean(self._task, TASKS))
    self.vocab_size = TASKS[self._task]
    if config.vocab_size != self.vocab_size:
      wanted = f"{self.vocab_size}, the vocabulary of {config.sources[0]}"
      raise ConfigError("data.vocab_size", config.vocab_size, wanted)
    if self._task == "retrieval" and config.seq_len < retrieval.LEAST_LENGTH:
      wanted = f"at least {retrieval.LEAST_LENGTH} for {config.sources[0]}: a row holds its facts"
      raise ConfigError("data.seq_len", config.seq_len, wanted)
    module = _MODULES.get(self._task)
    self.class_names = module.CLASS_NAMES if module else CLASS_NAMES
    generator = {"task": self._task}
    generator |= module.generator() if module else {"alphabet": ALPHABET}
    if self._task == "difficulty":
      generator |= {
        "shares": SHARES,
        "segment": [MIN_SEGMENT, MAX_SEGMENT],
        "table_sha256": hashlib.sha256(table().astype("<i4").tobytes()).hexdigest(),
      }
    self.fingerprint = hashlib.sha256(json.dumps(generator, sort_keys=True).encode()).hexdigest()
    rows = {"train": None, "validation": EVAL_ROWS, "test": EVAL_ROWS}  # None: without end
    self.manifest = [{"source": config.sources[0], "documents": None, "splits": rows, "generator": generator}]

  def train_loader(self, batch_size: int) -> Loader:
    """See `loader.Data`."""
    rows = grain.MapDataset.range(1 << 56).map(lambda index: self._row("train", int(index))._asdict())
    rows = rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    identity = [self.fingerprint, self.config.seed, self.config.seq_len]
    return Loader(rows, batch_size, hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16])

  def eval_batches(self, split: str, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """See `loader.Data`; a pass is `EVAL_ROWS` rows."""
    count = EVAL_ROWS if max_batches is None else min(EVAL_ROWS, max_batches * batch_size)
    for start in range(0, count, batch_size):
      rows = self._rows(split, start, min(start + batch_size, count))
      yield from batches_of_rows(rows, np.arange(len(rows.tokens)), batch_size, None)

  def train_token_pairs(self) -> Iterator[Pairs]:
    """See `loader.Data`; the first `PAIR_ROWS` rows."""
    at_once = max(1, (1 << 20) // self.config.seq_len)
    for start in range(0, PAIR_ROWS, at_once):
      tokens = self._rows("train", start, min(start + at_once, PAIR_ROWS)).tokens
      yield tokens[:, :-1].ravel(), tokens[:, 1:].ravel()

  def _rows(self, split: str, start: int, stop: int) -> Batch:
    rows = [self._row(split, index) for index in range(start, stop)]
    tokens, segments, classes = (
      np.stack([getattr(row, field) for row in rows]) for field in ("tokens", "segments", "classes")
    )
    return Batch(tokens, segments, classes)

  def _row(self, split: str, index: int) -> Batch:
    return sample_row(self._task, self.config.seed, split, index, self.config.seq_len + 1)
