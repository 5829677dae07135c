"""An interpolated Kneser-Ney bigram: what token statistics alone can do, the bar a language model has to clear.

Modified Kneser-Ney (Chen and Goodman 1999, section 3.3.2; https://dash.harvard.edu/handle/1/25104739):

  p(w | v) = (c(v, w) - D(c(v, w))) / c(v)  +  B(v) / c(v) * u(w)      where v was seen, else u(w)
  u(w)     = (n(w) - D_u) / N  +  D_u * |{w: n(w) > 0}| / N / V

c counts pairs, n(w) the different tokens before w, N their sum, D is one of three discounts (for counts 1, 2, more),
and B(v) is what they took from v. The last term spreads over the whole vocabulary, so no token has probability 0.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from moe_lab.types import Batch

Pairs = tuple[np.ndarray, np.ndarray]  # int [pairs] of tokens, and of the tokens that follow them


def pairs(batches: Iterable[Batch]) -> Pairs:
  """Returns the (input, target) pairs that a language model's loss counts: neighbours in the same document."""
  prev, next_ = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
  for batch in batches:
    prev.append(batch.tokens[:, :-1][batch.targets_BL])
    next_.append(batch.tokens[:, 1:][batch.targets_BL])
  return np.concatenate(prev), np.concatenate(next_)


@dataclasses.dataclass(frozen=True)
class BigramCounts:
  """Counts of the pairs that occur.

  Attributes:
    vocab_size: V.
    keys: int64 [pairs], prev * V + next, ascending.
    counts: int64 [pairs].
  """

  vocab_size: int
  keys: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, chunks: Iterable[Pairs], vocab_size: int) -> "BigramCounts":
    """Counts chunks of pairs; memory is that of one chunk and of the different pairs."""
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for prev, next_ in chunks:
      new, added = np.unique(prev.astype(np.int64) * vocab_size + next_, return_counts=True)
      keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
      counts = np.bincount(place, np.concatenate([counts, added])).astype(np.int64)
    return cls(vocab_size, keys, counts)


class KneserNeyBigram:
  """p(next | prev) for token ids below V.

  Attributes:
    discounts: D for counts 1, 2, 3 and more, then D_u; each in [0, 1], [0, 2], [0, 3] and [0, 1].
  """

  def __init__(self, counts: BigramCounts, discounts: Sequence[float]):
    self._vocab_size, self._keys = counts.vocab_size, counts.keys
    self.discounts = tuple(float(d) for d in discounts)
    size = counts.vocab_size
    prev, next_ = np.divmod(counts.keys, size)
    taken = np.array((0.0, *self.discounts[:3]))[np.minimum(counts.counts, 3)]
    total = np.bincount(prev, counts.counts, size)
    self._seen = (counts.counts - taken) / total[prev]
    # All of a context's mass goes to the unigram where the context was never seen.
    self._backoff = np.where(total > 0, np.bincount(prev, taken, size) / np.maximum(total, 1), 1.0)
    before = np.bincount(next_, minlength=size).astype(np.float64)
    types, kept = before.sum(), np.maximum(before - self.discounts[3], 0.0)
    self._unigram = (kept + (types - kept.sum()) / size) / types if types else np.full(size, 1.0 / size)

  @classmethod
  def fit(cls, chunks: Iterable[Pairs], vocab_size: int, discounts: Sequence[float] | None = None) -> "KneserNeyBigram":
    """Counts pairs, given in chunks; without `discounts`, they are estimated from the counts of counts."""
    counts = BigramCounts.of(chunks, vocab_size)
    return cls(counts, estimated_discounts(counts) if discounts is None else discounts)

  def nll(self, prev: np.ndarray, next_: np.ndarray) -> np.ndarray:
    """Returns float64 -ln p(next | prev), nats, elementwise over equal shapes."""
    prev, next_ = np.asarray(prev, np.int64), np.asarray(next_, np.int64)
    probability = self._backoff[prev] * self._unigram[next_]
    if len(self._keys):
      key = prev * self._vocab_size + next_
      place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
      probability = probability + np.where(self._keys[place] == key, self._seen[place], 0.0)
    return -np.log(probability)


def estimated_discounts(counts: BigramCounts) -> tuple[float, float, float, float]:
  """Returns Chen and Goodman's estimates from how many pairs occur once, twice, ...; 0.75 each where too few do."""

  def estimate(values: np.ndarray) -> list[float]:
    n1, n2, n3, n4 = (float(np.count_nonzero(values == k)) for k in (1, 2, 3, 4))
    if not min(n1, n2, n3, n4):
      return [0.75, 0.75, 0.75]
    y = n1 / (n1 + 2 * n2)
    estimates = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return [float(np.clip(d, 0.0, k)) for k, d in enumerate(estimates, 1)]

  before = np.bincount(counts.keys % counts.vocab_size, minlength=1)
  d1, d2, d3 = estimate(counts.counts)
  return d1, d2, d3, max(estimate(before)[0], 0.01)  # above 0: u(w) must reach every token


def tune(train: Iterable[Pairs], validation: Pairs, vocab_size: int) -> KneserNeyBigram:
  """Fits to training pairs, with the discounts that give the least loss on validation pairs.

  A coordinate search from Chen and Goodman's estimates; each step is halved when no coordinate gains.

  Args:
    train: pairs of the training split, in chunks.
    validation: pairs of the validation split.
    vocab_size: V.
  """
  counts = BigramCounts.of(train, vocab_size)
  held = BigramCounts.of([validation], vocab_size)  # equal pairs are looked up once
  prev, next_ = np.divmod(held.keys, vocab_size)

  def loss(discounts) -> float:
    return float(np.sum(held.counts * KneserNeyBigram(counts, discounts).nll(prev, next_)))

  best = list(estimated_discounts(counts))
  best_loss, step = loss(best), 0.1
  while step > 0.01:
    gained = False
    for index, high in enumerate((1.0, 2.0, 3.0, 1.0)):
      for change in (step, -step):
        tried = best.copy()
        tried[index] = float(np.clip(best[index] + change, 0.01, high - 0.01))
        if (tried_loss := loss(tried)) < best_loss:
          best, best_loss, gained = tried, tried_loss, True
    if not gained:
      step /= 2
  return KneserNeyBigram(counts, best)
