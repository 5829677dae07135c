"""Which split a document belongs to: decided by a hash of its text, so neither order nor the other sources matter.

Exact duplicates share a hash and land together: none is trained on and tested on.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from moe_lab.errors import ConfigError, UserError

SPLITS = ("train", "validation", "test")


def text_hash(text: str) -> int:
  """Returns 64 bits of the text's BLAKE2b."""
  return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def split_documents(
  texts: Sequence[Iterable[str]], validation_share: float, test_share: float
) -> list[dict[str, np.ndarray]]:
  """Divides the documents of all sources.

  Where the shares leave a split without a document, as happens with a handful, test, then validation take the nearest
  hashes, and training keeps the rest: at least one distinct document each.

  Args:
    texts: the documents of each source.
    validation_share, test_share: shares of the documents, in (0, 0.5].

  Returns:
    For each source, {split: int64 [documents]}, positions in the source, ascending.

  Raises:
    UserError: fewer than three distinct documents; shares that leave no training documents.
  """
  hashes = [np.fromiter((text_hash(text) for text in source), np.uint64) for source in texts]
  distinct = np.unique(np.concatenate(hashes))
  if len(distinct) < 3:
    raise UserError(f"config.data.sources: wanted at least 3 different documents, one a split, got {len(distinct)}")
  if validation_share + test_share >= 1:
    raise ConfigError(
      "data.validation_share",
      validation_share,
      f"a share that leaves documents to train on beside data.test_share = {test_share}",
    )
  # A split is a range of hashes. Bounds are counted in distinct documents, lowest hashes first.
  place = distinct.astype(np.float64) / 2.0**64
  last = len(distinct)
  test_end = int(np.clip(np.searchsorted(place, test_share), 1, last - 2))
  validation_end = int(np.clip(np.searchsorted(place, test_share + validation_share), test_end + 1, last - 1))
  splits = []
  for source in hashes:
    rank = np.searchsorted(distinct, source)
    chosen = {
      "train": rank >= validation_end,
      "validation": (rank >= test_end) & (rank < validation_end),
      "test": rank < test_end,
    }
    splits.append({split: np.flatnonzero(chosen[split]) for split in SPLITS})
  return splits
