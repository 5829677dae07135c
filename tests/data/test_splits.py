"""Splits: stable, disjoint by text, of the right size, never empty."""

import numpy as np
import pytest

from moe_lab.data.splits import SPLITS, split_documents
from moe_lab.errors import UserError


def texts_of(texts, split):
  return {name: {texts[i] for i in split[name]} for name in SPLITS}


def test_every_document_is_in_one_split_of_the_asked_size():
  texts = [f"document {i}" for i in range(4000)]
  [split] = split_documents([texts], 0.05, 0.1)
  assert sorted(np.concatenate([split[name] for name in SPLITS])) == list(range(4000))
  # 4000 draws: 200 and 400 expected, standard deviations 13.8 and 19.
  assert abs(len(split["validation"]) - 200) < 50
  assert abs(len(split["test"]) - 400) < 70


def test_order_and_new_documents_move_nothing():
  texts = [f"document {i}" for i in range(500)]
  [split] = split_documents([texts], 0.1, 0.1)
  [backwards] = split_documents([texts[::-1]], 0.1, 0.1)
  assert texts_of(texts, split) == texts_of(texts[::-1], backwards)
  first, second = split_documents([texts, [f"more {i}" for i in range(100)]], 0.1, 0.1)
  assert texts_of(texts, first) == texts_of(texts, split)
  assert sum(len(indices) for indices in second.values()) == 100


def test_duplicates_land_together():
  texts = [f"document {i % 50}" for i in range(200)]
  split = texts_of(texts, split_documents([texts], 0.2, 0.2)[0])
  assert not split["train"] & split["validation"] and not split["train"] & split["test"]
  assert not split["validation"] & split["test"]
  assert sum(len(part) for part in split.values()) == 50


@pytest.mark.parametrize("count", [3, 4, 7, 20])
@pytest.mark.parametrize("shares", [(0.001, 0.001), (0.49, 0.5), (0.05, 0.05)])
def test_a_handful_of_documents_fills_every_split(count, shares):
  for group in range(20):
    [split] = split_documents([[f"{group} {i}" for i in range(count)]], *shares)
    assert all(len(split[name]) for name in SPLITS)


def test_too_few_documents_or_too_large_shares():
  with pytest.raises(UserError, match="config.data.sources: wanted at least 3 different documents, .* got 2$"):
    split_documents([["a", "b"], ["a", "b"]], 0.1, 0.1)
  with pytest.raises(UserError, match="config.data.validation_share = 0.5: wanted a share that leaves"):
    split_documents([["a", "b", "c", "d"]], 0.5, 0.5)
