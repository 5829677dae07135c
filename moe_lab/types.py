"""Aliases shared by every package, and the one legend of dimension letters.

The same letter names a dimension in a variable's suffix (`x_TD`), in the
einsum (`"TD,DF->TF"`) and in a docstring.

  B  batch, in sequences          D  model width
  L  sequence length, in tokens   V  vocabulary
  S  key length (attention)       N  query heads
  T  tokens: B * L, flattened     M  key/value heads
  E  experts                      G  query heads per key/value head: N / M
  F  expert hidden width          H  head width
  K  expert slots per token       C  capacity of an expert, in rows
  R  routed rows                  Z  layers
  U  null experts                 J  budgets of a table (`routing/budget_table.py`)
  P  sequences rolled out twice   A  counts a policy chooses from: k_max - k_min + 1
  I  inner width of an adapter: its rank
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """Packed token rows as the loaders yield them.

  A row holds L + 1 tokens: its first L are the input, its last L the targets.
  A target counts only where it lies in the same document as its input.

  Attributes:
    tokens: int32 [B, L + 1].
    segments: int32 [B, L + 1], 1, 2, ... numbers the documents of a row; 0 is padding.
    classes: int32 [B, L + 1], the class of each token (an index into the
      dataset's `class_names`), for breakdowns in evaluation.
  """

  tokens: np.ndarray
  segments: np.ndarray
  classes: np.ndarray
