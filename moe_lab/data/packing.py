"""Documents laid end to end and cut into rows: no padding but at the very end, and no token twice."""

from collections.abc import Iterable, Iterator

import numpy as np

from moe_lab.types import Batch


def pack_rows(documents: Iterable[np.ndarray], row_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Packs a whole split.

  Args:
    documents: int [tokens] each, begin and end included.
    row_length: L + 1.

  Returns:
    tokens int32 [rows, L + 1], and segments int32 [rows, L + 1]: 1, 2, ... numbers the documents of a row; a document
    that continues from the row before is 1; 0 pads the last row.
  """
  documents = list(documents)
  lengths = [len(document) for document in documents]
  total = sum(lengths)
  rows = -(-total // row_length)
  tokens = np.zeros(rows * row_length, np.int32)
  owner = np.full(rows * row_length, -1, np.int32)
  if total:
    tokens[:total] = np.concatenate(documents)
    owner[:total] = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
  owner = owner.reshape(rows, row_length)
  segments = np.where(owner < 0, 0, owner - owner[:, :1] + 1).astype(np.int32)
  return tokens.reshape(rows, row_length), segments


def batches_of_rows(rows: Batch, order: np.ndarray, batch_size: int, max_batches: int | None) -> Iterator[Batch]:
  """Yields the rows of `rows` in `order`, `batch_size` at a time; the last batch is filled up with rows of zeros."""
  for index, start in enumerate(range(0, len(order), batch_size)):
    if index == max_batches:
      return
    chosen = order[start : start + batch_size]
    fill = ((0, batch_size - len(chosen)), (0, 0))
    yield Batch(*(field if field is None else np.pad(field[chosen], fill) for field in rows))
