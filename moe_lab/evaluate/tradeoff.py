"""A curve of loss against compute, known at a few models: what it says between them, and where it reaches a loss.

Piecewise linear in the logarithm of compute: over the factor of two between
neighbours of a study the curve of a power law is nearly straight there, and
nothing is fitted. Nothing is said outside the models that were measured.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]  # compute (FLOPs per token, experts, ... > 0), loss (nats per token)

MATCHED = 0.02  # two models whose compute differs by no more of it are compared as they are


def loss_at(curve: Sequence[Point], compute: float) -> float | None:
  """Returns the curve's loss at `compute`; None outside of it, or without two models."""
  points = sorted(curve)
  for (low, loss_low), (high, loss_high) in zip(points, points[1:], strict=False):
    if low <= compute <= high and high > low:
      share = math.log(compute / low) / math.log(high / low)
      return loss_low + share * (loss_high - loss_low)
  return None


def compute_at(curve: Sequence[Point], loss: float) -> float | None:
  """Returns the least compute at which the curve is at or below `loss`; None if it never gets there.

  If the first model is there already, its compute is an upper bound.
  """
  points = sorted(curve)
  if points and points[0][1] <= loss:
    return points[0][0]
  for (low, loss_low), (high, loss_high) in zip(points, points[1:], strict=False):
    if loss_high <= loss < loss_low:
      share = (loss_low - loss) / (loss_low - loss_high)
      return low * (high / low) ** share
  return None


def matched(compute: float, other: float) -> bool:
  """Returns whether two costs are equal as far as a comparison goes: `compute` within 2% of `other`."""
  return abs(compute - other) <= MATCHED * other
