"""How many activated experts a method needs to reach the loss of a fixed count of k_max / 2."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_lab.evaluate.tradeoff import Point, compute_at

LEAST_GAIN = 0.01  # of the loss, from k_max / 4 to k_max / 2: where experts buy nothing, saving them proves nothing


class Savings(NamedTuple):
  """Seeds that have all that it takes; "needed" is in mean experts per token and layer.

  Attributes:
    reference: k_max / 2.
    gain: share of the loss by which fixed k_max / 2 is better than fixed k_max / 4, mean over seeds.
    saturated: the gain is below 1%: the case says nothing.
    needed: seed -> least mean experts to reach the reference's loss of that seed; None if no budget reached it.
    mean_needed: over seeds; None if a seed did not reach it.
    saved: 1 - mean_needed / reference.
  """

  reference: int
  gain: float
  saturated: bool
  needed: dict[str, float | None]
  mean_needed: float | None
  saved: float | None


def savings(
  fixed: Mapping[str, Mapping[int, float]], method: Mapping[str, Sequence[Point]], k_max: int
) -> Savings | None:
  """Interpolates the method's losses over its budgets.

  Args:
    fixed: seed -> {k: held-out loss of the model trained with k experts for every token}.
    method: seed -> (mean experts measured, held-out loss) at each budget.
    k_max: the most experts of a token; a multiple of 4.

  Returns:
    None if no seed has fixed k_max / 2, fixed k_max / 4 and the method.
  """
  half, quarter = k_max // 2, k_max // 4
  seeds = [seed for seed in method if method[seed] and {half, quarter} <= set(fixed.get(seed, ()))]
  if not seeds:
    return None
  gain = statistics.fmean(1 - fixed[seed][half] / fixed[seed][quarter] for seed in seeds)
  needed = {seed: compute_at(method[seed], fixed[seed][half]) for seed in seeds}
  mean_needed = None if None in needed.values() else statistics.fmean(needed.values())
  saved = None if mean_needed is None else 1 - mean_needed / half
  return Savings(half, gain, gain < LEAST_GAIN, needed, mean_needed, saved)
