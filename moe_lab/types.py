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
  A target counts only where it lies in the same document as its input, and
  where it is to be learnt at all.

  Attributes:
    tokens: int32 [B, L + 1].
    segments: int32 [B, L + 1], 1, 2, ... numbers the documents of a row; 0 is padding.
    classes: int32 [B, L + 1], the class of each token (an index into the
      dataset's `class_names`), for breakdowns in evaluation.
    counted: bool [B, L + 1], which tokens are to be learnt: of a conversation the answers. None: all.
  """

  tokens: np.ndarray
  segments: np.ndarray
  classes: np.ndarray
  counted: np.ndarray | None = None

  @property
  def targets_BL(self) -> np.ndarray:
    """Returns bool [B, L]: where the next token is a target that counts."""
    here, following = self.segments[:, :-1], self.segments[:, 1:]
    targets = (here == following) & (here != 0)
    return targets if self.counted is None else targets & self.counted[:, 1:]
