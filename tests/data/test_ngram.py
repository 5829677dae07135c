"""The Kneser-Ney bigram against a slow one written from the formula."""

import math
from collections import Counter

import numpy as np
import pytest

from moe_lab.data.ngram import BigramCounts, KneserNeyBigram, estimated_discounts, pairs, tune
from moe_lab.types import Batch


def reference(prev, next_, size, discounts):
  """Returns p[v][w], one probability at a time."""
  counts = Counter(zip(prev, next_, strict=True))
  take = lambda c: discounts[min(c, 3) - 1]  # noqa: E731
  before = Counter(w for _, w in counts)
  types = sum(before.values())
  freed = sum(min(n, discounts[3]) for n in before.values())
  unigram = [max(before[w] - discounts[3], 0) / types + freed / types / size for w in range(size)]
  table = []
  for v in range(size):
    followers = {w: c for (u, w), c in counts.items() if u == v}
    total = sum(followers.values())
    if not total:
      table.append(unigram)
      continue
    backoff = sum(take(c) for c in followers.values()) / total
    table.append([
      (followers[w] - take(followers[w]) if w in followers else 0) / total + backoff * unigram[w] for w in range(size)
    ])  # fmt: skip
  return np.array(table)


@pytest.fixture
def corpus():
  # Zipf-like tokens that follow one another, 3 of 20 ids never seen.
  rng = np.random.default_rng(0)
  stream = np.minimum(rng.zipf(1.5, 400) - 1, 16)
  return stream[:-1], stream[1:]


@pytest.mark.parametrize("discounts", [(0.5, 1.1, 1.4, 0.3), (0.75, 0.75, 0.75, 0.75), (1.0, 2.0, 3.0, 1.0)])
def test_equals_the_reference_and_sums_to_one(corpus, discounts):
  model = KneserNeyBigram.fit([corpus], 20, discounts)
  v, w = np.meshgrid(np.arange(20), np.arange(20), indexing="ij")
  probability = np.exp(-model.nll(v, w))
  np.testing.assert_allclose(probability, reference(*map(np.ndarray.tolist, corpus), 20, discounts), rtol=1e-12)
  np.testing.assert_allclose(probability.sum(1), 1.0, rtol=1e-12)
  assert probability.min() > 0 and model.nll(v, w).dtype == np.float64


def test_worked_by_hand():
  # Pairs 0->1 twice, 0->2 once, 1->2 once; V = 4, every discount 0.5.
  model = KneserNeyBigram.fit([(np.array([0, 0, 0, 1]), np.array([1, 1, 2, 2]))], 4, (0.5, 0.5, 0.5, 0.5))
  # n(1) = 1, n(2) = 2, N = 3; u(2) = 1.5/3 + (0.5 * 2/3)/4 = 7/12; u(3) = 1/12.
  assert model.nll(3, 2) == pytest.approx(-math.log(7 / 12))
  # p(2|0) = 0.5/3 + (1/3) * 7/12 = 13/36; p(3|0) = (1/3)/12 = 1/36.
  assert model.nll(0, 2) == pytest.approx(-math.log(13 / 36))
  assert model.nll(0, 3) == pytest.approx(-math.log(1 / 36))


def test_chunks_add_up(corpus):
  prev, next_ = corpus
  whole = BigramCounts.of([corpus], 20)
  parts = BigramCounts.of([(prev[:100], next_[:100]), (prev[100:], next_[100:])], 20)
  np.testing.assert_array_equal(whole.keys, parts.keys)
  np.testing.assert_array_equal(whole.counts, parts.counts)


def test_tuning_only_helps_and_beats_every_grid_point(corpus):
  rng = np.random.default_rng(1)
  stream = np.minimum(rng.zipf(1.5, 200) - 1, 16)
  held = stream[:-1], stream[1:]
  model = tune([corpus], held, 20)
  best = model.nll(*held).mean()
  assert best <= KneserNeyBigram.fit([corpus], 20).nll(*held).mean()
  for d in (0.25, 0.5, 0.75, 0.9):
    assert best <= KneserNeyBigram.fit([corpus], 20, (d, d, d, d)).nll(*held).mean() + 1e-9
  v, w = np.meshgrid(np.arange(20), np.arange(20), indexing="ij")
  np.testing.assert_allclose(np.exp(-model.nll(v, w)).sum(1), 1.0, rtol=1e-12)


def test_estimates_stay_in_range(corpus):
  for d, high in zip(estimated_discounts(BigramCounts.of([corpus], 20)), (1, 2, 3, 1), strict=True):
    assert 0 <= d <= high


def test_learns_a_chain():
  # 0 -> 1 -> 2 -> 0 with 10% noise over 8 tokens: the loss nears the source's entropy.
  rng = np.random.default_rng(0)
  prev = rng.integers(0, 8, 200_000)
  next_ = np.where(rng.random(200_000) < 0.1, rng.integers(0, 8, 200_000), (prev + 1) % 8)
  loss = KneserNeyBigram.fit([(prev, next_)], 8).nll(prev, next_).mean()
  hit = 0.9 + 0.1 / 8
  entropy = -(hit * math.log(hit) + 7 * 0.0125 * math.log(0.0125))
  assert loss == pytest.approx(entropy, abs=0.01)


def test_pairs_count_as_the_language_model_does():
  tokens = np.array([[1, 2, 3, 4, 0]], np.int32)
  segments = np.array([[1, 1, 2, 2, 0]], np.int32)
  prev, next_ = pairs([Batch(tokens, segments, tokens)])
  assert prev.tolist() == [1, 3] and next_.tolist() == [2, 4]
  assert len(pairs([])[0]) == 0
