"""Synthetic tasks: rules hold token by token, and token ids alone tell nothing."""

import json

import numpy as np
import pytest

from moe_lab.config.schema import DataConfig
from moe_lab.data import synthetic
from moe_lab.data.loader import open_data
from moe_lab.data.ngram import pairs
from moe_lab.errors import ConfigError

N = synthetic.ALPHABET
MARKER, EASY, HARD, NOISE = range(4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return open_data(
    DataConfig(sources=("synthetic:difficulty",), vocab_size=N + 3, seq_len=256), tmp_path_factory.mktemp("cache")
  )


@pytest.fixture(scope="module")
def rows():
  drawn = [synthetic.sample_row("difficulty", 0, "train", i, 257) for i in range(800)]
  return np.stack([row.tokens for row in drawn]), np.stack([row.classes for row in drawn])


def test_the_table_is_a_latin_square():
  table = synthetic.table()
  assert (np.sort(table, axis=0) == np.arange(N)[:, None]).all()
  assert (np.sort(table, axis=1) == np.arange(N)).all()
  # Not an addition table under other names: there, two rows differ by a permutation of one and the same order.
  shift = np.argsort(table[0])[table[1]]
  cycles, seen = set(), set()
  for start in range(N):
    length, at = 0, start
    while at not in seen:
      seen.add(at)
      at, length = int(shift[at]), length + 1
    cycles.add(length)
  assert len(cycles - {0}) > 1


def test_each_class_follows_its_rule(rows):
  tokens, classes = rows
  assert ((tokens >= N) <= (classes == MARKER)).all()
  easy = np.argwhere(classes == EASY)
  hard = np.argwhere(classes == HARD)
  at = lambda where, back: tokens[where[:, 0], where[:, 1] - back]  # noqa: E731
  assert (at(easy, 0) == at(easy, 2)).all()
  assert (at(hard, 0) == synthetic.table()[at(hard, 2), at(hard, 1)]).all()
  for row, kinds in zip(tokens[:50], classes[:50], strict=True):
    starts = np.flatnonzero(row >= N)
    assert starts[0] == 0
    for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
      kind = row[start] - N + 1
      rule_from = start + (1 if kind == NOISE else 3)
      assert (kinds[rule_from:end] == kind).all() and (kinds[start : min(rule_from, end)] == MARKER).all()
      assert synthetic.MIN_SEGMENT <= end - start - 1 <= synthetic.MAX_SEGMENT or end == len(row)


def test_shares_of_the_classes(rows):
  classes = rows[1][rows[1] != MARKER]
  for kind, share in ((EASY, 0.4), (HARD, 0.2), (NOISE, 0.4)):
    assert abs((classes == kind).mean() - share) < 0.015


def test_tokens_are_uniform_in_every_class_and_place(rows):
  tokens, classes = rows
  assert tokens[classes != MARKER].max() < N
  for kind in (EASY, HARD, NOISE):
    row, start = np.nonzero(tokens[:, : -synthetic.MIN_SEGMENT] == N + kind - 1)
    for offset in (1, 2, 3, 5, synthetic.MIN_SEGMENT):
      counts = np.bincount(tokens[row, start + offset], minlength=N)  # one a segment: independent draws
      chi2 = (counts - counts.mean()) ** 2 / counts.mean()
      assert chi2.sum() / (N - 1) < 2  # mean 1, standard deviation sqrt(2 / 47) = 0.21
  # In hard segments the previous token alone predicts nothing: its conditional entropy is that of the alphabet.
  where = np.argwhere(classes == HARD)
  joint = np.zeros((N, N))
  np.add.at(joint, (tokens[where[:, 0], where[:, 1] - 1], tokens[where[:, 0], where[:, 1]]), 1)
  expected = joint.sum() / N**2
  chi2 = ((joint - expected) ** 2 / expected).sum()
  assert chi2 / (N**2 - 1) < 1.3


def test_streams_are_deterministic_and_apart():
  row = lambda *key: synthetic.sample_row("difficulty", *key, 65).tokens.tolist()  # noqa: E731
  assert row(0, "train", 5) == row(0, "train", 5)
  drawn = [row(seed, "train", i) for seed in (0, 1) for i in (0, 5)] + [row(0, s, 5) for s in ("validation", "test")]
  assert len({tuple(r) for r in drawn}) == len(drawn)
  # Every seed is evaluated on the same rows.
  assert row(0, "test", 5) == row(7, "test", 5)


def test_resume_is_exact(data):
  loader = data.train_loader(4)
  for _ in range(3):
    next(loader)
  state = json.loads(json.dumps(loader.get_state()))
  want = next(loader)
  resumed = data.train_loader(4)
  resumed.set_state(state)
  *again, counted = next(resumed)
  assert counted is None  # every token is to be learnt
  for got, field in zip(again, want[:3], strict=True):
    np.testing.assert_array_equal(got, field)
    assert got.shape == (4, 257) and got.dtype == np.int32
  assert (want.segments == 1).all()


def test_evaluation_and_pairs(data):
  batches = list(data.eval_batches("validation", 100))
  assert len(batches) == 11  # 1024 rows
  assert sum(int((b.segments[:, 0] > 0).sum()) for b in batches) == synthetic.EVAL_ROWS
  first = next(data.eval_batches("validation", 100, max_batches=1))
  np.testing.assert_array_equal(first.tokens, batches[0].tokens)
  prev, next_ = next(data.train_token_pairs())
  want = pairs([next(data.train_loader(8))])
  np.testing.assert_array_equal(prev[: 8 * 256], want[0])
  np.testing.assert_array_equal(next_[: 8 * 256], want[1])


def test_what_is_recorded(data):
  assert data.tokenizer is None and data.class_names == ("marker", "easy", "hard", "noise")
  assert data.manifest[0]["generator"]["alphabet"] == N
  json.dumps(data.manifest)


def test_noise_task(tmp_path):
  data = open_data(DataConfig(sources=("synthetic:noise",), vocab_size=N, seq_len=64), tmp_path)
  batch = next(data.train_loader(2))
  assert (batch.classes == NOISE).all() and batch.tokens.max() < N
  assert data.fingerprint != synthetic.SyntheticData(
    DataConfig(sources=("synthetic:difficulty",), vocab_size=N + 3)).fingerprint  # fmt: skip


def test_mistakes(tmp_path):
  with pytest.raises(ConfigError, match=r"config.data.vocab_size = 2048: wanted 27, the vocabulary of synthetic:diff"):
    open_data(DataConfig(sources=("synthetic:difficulty",)), tmp_path)
  with pytest.raises(ConfigError, match=r"config.data.sources = 'synthetic:dificulty': .*did you mean 'difficulty'"):
    open_data(DataConfig(sources=("synthetic:dificulty",)), tmp_path)
