"""The way into the data: `open_data` gives the same interface for text and for synthetic tasks."""

import os
from collections.abc import Iterator
from typing import Protocol

from moe_lab.config.schema import DataConfig
from moe_lab.data.iterator import Loader
from moe_lab.data.ngram import Pairs
from moe_lab.data.synthetic import SyntheticData
from moe_lab.data.text import TextData
from moe_lab.data.tokenizer import Tokenizer
from moe_lab.types import Batch

__all__ = ["Data", "Loader", "open_data"]


class Data(Protocol):
  """Batches of a dataset, and what a run records about it.

  Attributes:
    config: what it was opened with.
    tokenizer: None for a synthetic task.
    vocab_size: V.
    fingerprint: SHA-256 of the tokenizer's model, or of the synthetic task, in hex.
    manifest: a dict for each source: "source", "documents", "splits" (documents in each), and "files" (name, SHA-256,
      bytes, license) or, for a synthetic task, "generator"; with `data.corrupt` skip also "skipped" (how many documents
      were left out), "skipped_by_reason" and "skipped_first", where the first ones are.
    class_names: names for the values of `Batch.classes`.
  """

  config: DataConfig
  tokenizer: Tokenizer | None
  vocab_size: int
  fingerprint: str
  manifest: list[dict]
  class_names: tuple[str, ...]

  def train_loader(self, batch_size: int) -> Loader:
    """Returns batches [batch_size, L + 1] of the training split, without end, shuffled anew each epoch.

    A document longer than a row continues in the next; rows do not overlap, so a row's first token is no target.
    """

  def eval_batches(self, split: str, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """Yields batches [batch_size, L + 1] of "train", "validation" or "test": one pass, always in the same order.

    The last batch is filled up with segment 0. `max_batches` ends the pass early, after a fair sample of the rows.
    """

  def train_token_pairs(self) -> Iterator[Pairs]:
    """Yields every (token, next token) of the training split once, in chunks; documents begin with their begin token.

    A synthetic task, which has no end, yields a fixed number of rows.
    """


def open_data(config: DataConfig, cache_dir: str | os.PathLike) -> Data:
  """Opens, checks and splits the sources, and trains or loads the tokenizer.

  Args:
    config: what to read.
    cache_dir: trained tokenizers are kept here.

  Raises:
    UserError: the sources, the splits or the tokenizer cannot be used; one line that names the field.
  """
  if config.sources[0].startswith("synthetic:"):
    return SyntheticData(config)
  return TextData(config, cache_dir)
