"""When a difference between two methods counts: paired by seed, of one sign, and above two standard errors."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

STANDARD_ERRORS = 2.0


class PairedDifference(NamedTuple):
  """Loss of ours minus loss of the control, on the seeds that both have; negative is better.

  Attributes:
    by_seed: seed -> difference, nats per token.
    mean: over seeds; None without a seed in common.
    standard_error: of the mean, from the spread over seeds; None with fewer than two.
    win: below zero on every seed, and the mean by more than two standard errors.
  """

  by_seed: dict[str, float]
  mean: float | None
  standard_error: float | None
  win: bool


def paired_difference(ours: Mapping[str, float], control: Mapping[str, float]) -> PairedDifference:
  """Compares the losses of two methods, each seed -> nats per token.

  One seed decides nothing: without a spread there is no win. Neither do two seeds that agree exactly say anything
  about a third, but then the criterion is met and the table shows how many there were.
  """
  by_seed = {seed: ours[seed] - control[seed] for seed in ours if seed in control}
  differences = list(by_seed.values())
  if not differences:
    return PairedDifference({}, None, None, False)
  mean = statistics.fmean(differences)
  if len(differences) < 2:
    return PairedDifference(by_seed, mean, None, False)
  error = statistics.stdev(differences) / math.sqrt(len(differences))
  win = max(differences) < 0 and -mean > STANDARD_ERRORS * error
  return PairedDifference(by_seed, mean, error, win)


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
  """Returns the 95% interval of a share, `right` of `asked` (Wilson 1927); also where none is right it has a width."""
  if not asked:
    return 0.0, 1.0
  z = 1.959964
  share, weight = right / asked, z * z / asked
  middle = (share + weight / 2) / (1 + weight)
  half = z / (1 + weight) * math.sqrt(share * (1 - share) / asked + weight / (4 * asked))
  return max(middle - half, 0.0), min(middle + half, 1.0)
