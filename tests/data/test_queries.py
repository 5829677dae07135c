"""The queries task: every answer follows from its question, and only answers carry its class."""

import json

import numpy as np
import pytest

from moe_lab.config.schema import DataConfig
from moe_lab.data import queries as q
from moe_lab.data.loader import open_data
from moe_lab.data.synthetic import sample_row
from moe_lab.errors import ConfigError

OTHER = 0


def digits(tokens):
  assert all(q.DIGIT <= token < q.DIGIT + q.DIGITS for token in tokens)
  return [token - q.DIGIT for token in tokens]


def number(tokens):
  return sum(digit * 10**place for place, digit in enumerate(digits(tokens)))


def answer_of(kind, question):
  """Returns what the rules of the task give after `question` (all that stands between the marker and the answer)."""
  if kind == "recall":
    pairs = dict(zip(question[0:8:2], question[1:8:2], strict=True))
    assert question[-2] == q.ASK and len(pairs) == q.PAIRS
    return pairs[question[-1]]
  if kind == "translation":
    words, given = question[: question.index(q.EQUALS)], question[question.index(q.EQUALS) + 1 :]
    return q.FOREIGN + q.dictionary()[words[-1 - len(given)]]
  if kind == "arithmetic":
    assert question[3] == q.PLUS and question[7] == q.EQUALS
    total = number(question[:3]) + number(question[4:7])
    return q.DIGIT + total // 10 ** len(question[8:]) % 10
  state = digits(question[:1])[0]
  applied = question[1 : question.index(q.EQUALS)]
  if kind == "steps":
    applied = applied[: len(question) - question.index(q.EQUALS)]
  for function in applied:
    state = q.functions()[function - q.FUNCTION][state]
  return q.DIGIT + state


@pytest.fixture(scope="module")
def rows():
  drawn = [sample_row("queries", 0, "train", index, 257) for index in range(300)]
  return [(row.tokens, row.classes) for row in drawn]


def segments(tokens, classes):
  starts = [*np.flatnonzero((tokens >= q.MARKER) & (tokens < q.EQUALS)), len(tokens)]
  assert starts[0] == 0
  for start, end in zip(starts, starts[1:], strict=False):
    yield q.KINDS[tokens[start] - q.MARKER], tokens[start + 1 : end].tolist(), classes[start:end].tolist(), end


def test_worked_examples(monkeypatch):
  monkeypatch.setattr(q, "dictionary", lambda: [(7 * word + 3) % q.WORDS for word in range(q.WORDS)])
  monkeypatch.setattr(q, "functions", lambda: [[(digit + 1) % 10 for digit in range(10)], list(range(9, -1, -1))] * 4)
  d = lambda *values: [q.DIGIT + value for value in values]  # noqa: E731
  # 0 -> 3, 1 -> 10, 2 -> 17; the last word first.
  assert answer_of("translation", [0, 1, 2, q.EQUALS]) == q.FOREIGN + 17
  assert answer_of("translation", [0, 1, 2, q.EQUALS, q.FOREIGN + 17]) == q.FOREIGN + 10
  # 975 + 38 = 1013, modulo 1000 013; units first: 5 7 9 + 8 3 0 = 3 1 0.
  sum_ = [*d(5, 7, 9), q.PLUS, *d(8, 3, 0), q.EQUALS]
  assert [answer_of("arithmetic", sum_ + d(3, 1, 0)[:n]) for n in range(3)] == d(3, 1, 0)
  # 4, plus one, is 5; nine minus it is 4; plus one is 5.
  chain = [*d(4), q.FUNCTION, q.FUNCTION + 1, q.FUNCTION + 2, q.EQUALS]
  assert answer_of("chain", chain) == q.DIGIT + 5
  assert [answer_of("steps", chain + d(5, 4, 5)[:n]) for n in range(3)] == d(5, 4, 5)


def test_every_answer_follows_from_its_question(rows):
  seen = dict.fromkeys(q.KINDS, 0)
  for tokens, classes in rows:
    for kind, body, labels, end in segments(tokens, classes):
      assert labels[0] == OTHER and set(labels) <= {OTHER, 1 + q.KINDS.index(kind)}
      for place, label in enumerate(labels[1:]):
        if kind == "noise":
          assert label and body[place] < q.WORDS
        elif label:
          assert body[place] == answer_of(kind, body[:place])
          seen[kind] += 1
      if end < len(tokens) and kind != "noise":
        answers = {"recall": 3, "arithmetic": 3, "chain": 1}
        assert sum(map(bool, labels)) == (answers.get(kind) or len(body) - body.index(q.EQUALS) - 1)
  assert min(count for kind, count in seen.items() if kind != "noise") > 2000


def test_tables_are_permutations():
  assert sorted(q.dictionary()) == list(range(q.WORDS))
  assert all(sorted(function) == list(range(10)) for function in q.functions())
  assert len({tuple(function) for function in q.functions()}) == q.FUNCTIONS


def test_no_kind_is_rare_and_answers_are_even(rows):
  tokens, classes = np.concatenate([t for t, _ in rows]), np.concatenate([c for _, c in rows])
  shares = np.bincount(classes, minlength=len(q.CLASS_NAMES)) / len(classes)
  assert shares[1:].min() > 0.033 and shares[0] < 0.7
  for kind in ("arithmetic", "chain", "steps"):
    counts = np.bincount(tokens[classes == q.CLASS_NAMES.index(kind)] - q.DIGIT, minlength=10)
    chi2 = (counts - counts.mean()) ** 2 / counts.mean()
    assert chi2.sum() / 9 < 3.5  # mean 1, standard deviation sqrt(2 / 9) = 0.47


def test_streams_are_deterministic_and_apart():
  row = lambda *key: sample_row("queries", *key, 65).tokens.tolist()  # noqa: E731
  assert row(0, "train", 5) == row(0, "train", 5)
  drawn = [row(seed, "train", i) for seed in (0, 1) for i in (0, 5)] + [row(0, s, 5) for s in ("validation", "test")]
  assert len({tuple(r) for r in drawn}) == len(drawn)
  assert row(0, "test", 5) == row(7, "test", 5)  # every seed is evaluated on the same rows


def test_as_a_dataset(tmp_path):
  data = open_data(DataConfig(sources=("synthetic:queries",), vocab_size=q.VOCAB_SIZE, seq_len=128), tmp_path)
  assert data.class_names == ("other", "recall", "translation", "arithmetic", "chain", "steps", "noise")
  batch = next(data.train_loader(4))
  assert batch.tokens.shape == (4, 129) and batch.tokens.max() < q.VOCAB_SIZE and (batch.segments == 1).all()
  assert next(data.eval_batches("validation", 4)).classes.max() <= 6
  json.dumps(data.manifest)
  with pytest.raises(ConfigError, match=r"config.data.vocab_size = 2048: wanted 155, the vocabulary of synthetic:quer"):
    open_data(DataConfig(sources=("synthetic:queries",)), tmp_path)
