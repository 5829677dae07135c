"""The retrieval task: every answer was told before, held-out rows ask at their end, and facts lie anywhere."""

from collections import Counter

import numpy as np
import pytest

from moe_lab.config.schema import DataConfig
from moe_lab.data import retrieval as r
from moe_lab.data.loader import open_data
from moe_lab.data.synthetic import sample_row
from moe_lab.errors import ConfigError


def documents(split, count=200, length=257):
  """Returns tokens and classes of each document."""
  rows = [sample_row("retrieval", 0, split, index, length) for index in range(count)]
  return [
    (row.tokens[row.segments == number], row.classes[row.segments == number])
    for row in rows
    for number in range(1, row.segments.max() + 1)
  ]


def facts_of(tokens):
  """Returns question -> answer of all that is told, and where each stands, by reading the row."""
  told, places = {}, {}
  for place, token in enumerate(tokens):
    if place and tokens[place - 1] == r.ASK:
      continue
    if token == r.PASS:
      told[token], places[token] = tokens[place + 1 : place + 1 + r.PLACES], place
    elif r.KEY <= token < r.VALUE:
      told[token], places[token] = tokens[place + 1 : place + 2], place
  return told, places


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_answer_was_told_before(split):
  kinds = set()
  for tokens, classes in documents(split):
    tokens, classes = tokens.tolist(), classes.tolist()
    told, places = facts_of(tokens)
    assert (len(told) <= r.KEYS) if split == "train" else (len(told) in (1, r.PAIRS))
    for place in np.flatnonzero(np.array(tokens) == r.ASK).tolist():
      question, answer = tokens[place + 1], tokens[place + 2 : place + 2 + len(told[tokens[place + 1]])]
      assert places[question] < place and told[question][: len(answer)] == answer
      kind = 1 if question == r.PASS else 2
      assert classes[place + 2 : place + 2 + len(answer)] == [kind] * len(answer)
      kinds.add(kind)
  assert kinds == {1, 2}


def test_held_out_rows_ask_everything_once_at_the_end():
  depths = []
  for tokens, classes in documents("validation"):
    told, places = facts_of(tokens.tolist())
    asks = np.flatnonzero(tokens == r.ASK)
    assert sorted(tokens[asks + 1].tolist()) == sorted(told)
    size = 3 if len(told) > 1 else 2 + r.PLACES
    assert asks[0] == len(tokens) - size * len(told)
    depths += [place / asks[0] for place in places.values()]
    assert (classes != 0).sum() == len(told) * (size - 2)
  # Facts lie anywhere: the depth's mean and spread are those of a uniform variable.
  assert np.mean(depths) == pytest.approx(0.5, abs=0.05) and np.std(depths) == pytest.approx(0.29, abs=0.04)


def test_training_documents_tell_in_their_first_half_and_ask_in_their_second():
  distances = []
  for tokens, _ in documents("train", length=1025):
    told, places = facts_of(tokens.tolist())
    asks, half = np.flatnonzero(tokens == r.ASK), len(tokens) // 2
    assert max(places.values()) < half <= asks[0]
    assert len(asks) == half // (r.ASK_EVERY + (6 if r.PASS in told else 3))
    if len(tokens) == 1025:
      distances += [place - places[tokens[place + 1]] for place in asks]
  assert np.mean(distances) == pytest.approx(512, rel=0.1) and min(distances) < 100 and max(distances) > 900


def test_training_rows_are_of_one_to_eight_documents_and_held_out_ones_of_one():
  counts = Counter()
  for index in range(200):
    row = sample_row("retrieval", 0, "train", index, 1025)
    assert (np.diff(row.segments) >= 0).all()
    lengths = np.bincount(row.segments)[1:]
    assert set(lengths[:-1]) <= {1025 // len(lengths)} and 0 <= lengths[-1] - lengths[0] < len(lengths)
    counts[len(lengths)] += 1
    assert sample_row("retrieval", 0, "validation", index, 1025).segments.tolist() == [1] * 1025
  assert set(counts) == {1, 2, 4, 8} and min(counts.values()) > 30


def test_the_shortest_row_has_room():
  for split in ("train", "validation"):
    assert all(len(tokens) == r.LEAST_LENGTH for tokens, _ in documents(split, length=r.LEAST_LENGTH))


def test_length_is_checked():
  config = DataConfig(sources=("synthetic:retrieval",), vocab_size=r.VOCAB_SIZE, seq_len=64)
  with pytest.raises(ConfigError, match="data.seq_len = 64: wanted at least 128"):
    open_data(config, None)
