"""How much of a run's time went into steps that count: goodput.

What is lost: compiling, evaluating, saving, steps that were done again after a restart, and the time between launches.
"""

import datetime
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Goodput(NamedTuple):
  """Seconds of steps that the run is made of, and from its first launch to its newest record."""

  useful: float
  elapsed: float

  @property
  def share(self) -> float:
    return self.useful / self.elapsed


def goodput(train: Sequence[dict], info: dict) -> Goodput | None:
  """Returns what a run's records say; None before they say anything.

  Args:
    train: the records of metrics.jsonl that are of training, in the order of their steps. Those of steps that were done
      again are not among them.
    info: its run.json.
  """
  steps = [record["step"] - before for record, before in zip(train, [0, *(r["step"] for r in train)], strict=False)]
  speeds = [record.get("tokens_per_second") for record in train]
  if not train or not all(speeds) or not train[-1].get("time") or not info.get("started"):
    return None
  # A record of n steps and its tokens per second give seconds per step, where all steps have the same tokens; the
  # median leaves out what compiling adds to the first of a launch.
  tokens = train[-1]["tokens"] / train[-1]["step"]
  typical = statistics.median(tokens / speed for speed in speeds)
  useful = sum(n * min(tokens / speed, typical) for n, speed in zip(steps, speeds, strict=True))
  began = datetime.datetime.fromisoformat(info["started"]).timestamp()
  # A clock that was set back must not make more of the time than there was.
  return Goodput(useful, max(max(record.get("time", 0.0) for record in train) - began, useful))
