"""Slopes of the modified ALiBi: one a KV group, some of them zero.

ALiBi (arXiv 2108.12409) subtracts slope * distance from the attention logit,
with a slope per query head. Here the query heads of a KV group share one, so
that they share a window and a cache; global groups have slope 0 and see the
whole context.
"""

import math

import numpy as np

NEGLIGIBLE = 1e-7  # share of a softmax that float32 does not see


def alibi_slopes(num_kv_heads: int, num_global_groups: int) -> np.ndarray:
  """Returns slopes_M: float32 [M], steepest first, global groups (0) last.

  The windowed groups' slopes are 2^-x with x spread evenly over (0, 8), as in
  ALiBi, but centred, so that a single windowed group gets the middle (2^-4).
  """
  windowed = num_kv_heads - num_global_groups
  exponents = 8 * (np.arange(windowed) + 0.5) / max(windowed, 1)
  return np.concatenate([2.0**-exponents, np.zeros(num_global_groups)]).astype(np.float32)


def windows(slope_M: np.ndarray, bound: float | None) -> tuple[int | None, ...]:
  """Returns for each KV group how many keys a query has to look at, itself included; None: all of them.

  Further keys together weigh less than `NEGLIGIBLE` of the nearest one alone. At distance d a key's logit is at most
  S - m d and a query's own is at least -S: from distance w on all weigh at most e^(2S - m w) / (1 - e^-m) of it.

  Args:
    slope_M: m, as `alibi_slopes` gives it.
    bound: S, which |q.k| / sqrt(H) never exceeds; None: there is no such bound, and no window.
  """
  if bound is None:
    return (None,) * len(slope_M)
  slopes = np.asarray(slope_M, np.float64)
  with np.errstate(divide="ignore"):
    lengths = (2 * bound - np.log(NEGLIGIBLE) - np.log(-np.expm1(-slopes))) / slopes
  return tuple(math.ceil(length) if slope > 0 else None for length, slope in zip(lengths, slopes, strict=True))
