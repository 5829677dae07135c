"""Slopes of the modified ALiBi: one a KV group, some of them zero.

ALiBi (arXiv 2108.12409) subtracts slope * distance from the attention logit,
with a slope per query head. Here the query heads of a KV group share one, so
that they share a window and a cache; global groups have slope 0 and see the
whole context.
"""

import numpy as np


def alibi_slopes(num_kv_heads: int, num_global_groups: int) -> np.ndarray:
  """Returns slopes_M: float32 [M], steepest first, global groups (0) last.

  The windowed groups' slopes are 2^-x with x spread evenly over (0, 8), as in
  ALiBi, but centred, so that a single windowed group gets the middle (2^-4).
  """
  windowed = num_kv_heads - num_global_groups
  exponents = 8 * (np.arange(windowed) + 0.5) / max(windowed, 1)
  return np.concatenate([2.0**-exponents, np.zeros(num_global_groups)]).astype(np.float32)
