"""What a contender builds for a benchmark, and how it names itself."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Work:
  """One thing to time.

  Attributes:
    run: does it once and waits for the end.
    unit: of `amount`, such as "token".
    amount: units that a run works through.
    report: after the runs: numbers to keep, FLOPs of a run ("flops") among them where they can be said.
    forget: leaves what was timed within the last run out of the report.
  """

  run: Callable[[], None]
  unit: str
  amount: float
  report: Callable[[], dict] = dict
  forget: Callable[[], None] = lambda: None
