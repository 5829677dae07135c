"""Packing, on numbers worked by hand."""

import numpy as np

from moe_lab.data.packing import batches_of_rows, pack_rows
from moe_lab.types import Batch


def test_rows_segments_and_padding():
  documents = [np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8, 9]), np.array([10])]
  tokens, segments = pack_rows(documents, 4)
  assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
  assert segments.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 0, 0]]
  assert tokens.dtype == segments.dtype == np.int32


def test_nothing_packs_to_no_rows():
  tokens, segments = pack_rows([], 4)
  assert tokens.shape == segments.shape == (0, 4)


def test_batches_cover_the_order_once_and_fill_the_last():
  rows = Batch(*(np.arange(1, 11).reshape(5, 2) for _ in range(3)))
  batches = list(batches_of_rows(rows, np.array([4, 0, 1, 2, 3]), 2, None))
  assert [b.tokens.tolist() for b in batches] == [[[9, 10], [1, 2]], [[3, 4], [5, 6]], [[7, 8], [0, 0]]]
  assert batches[-1].segments[1].tolist() == [0, 0]
  assert len(list(batches_of_rows(rows, np.arange(5), 2, 1))) == 1
