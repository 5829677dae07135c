"""Lets contenders take turns, and sums up what they measured."""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.worker import Contender
from moe_lab.errors import RunError

RUNS = 2  # timed runs a turn
PAUSE = 0.5  # seconds before a run, in which the last contender's threads stop spinning
PEAK_SIZES = {"cpu": (1024, 2048), "gpu": (4096, 8192)}


@dataclasses.dataclass(frozen=True)
class Result:
  """One contender's figures; None where it has none.

  Attributes:
    name, case: who, and at what.
    side: ours | peer.
    rival: whether it is a peer in its usual setting, which ratios are over.
    seconds: median of a run; `low` and `high` are its quartiles.
    per_second: units (`unit`) a second, from the median.
    flops_per_second: analytical FLOPs of a run over its median.
    peak_bytes: memory above that of the imported libraries; of the accelerator where there is one.
    seconds_to_first_run: building and compiling.
    numbers: whatever else the work reported.
  """

  name: str
  case: str
  side: str
  rival: bool
  unit: str
  seconds: float
  low: float
  high: float
  per_second: float
  flops_per_second: float | None
  peak_bytes: int
  seconds_to_first_run: float
  numbers: dict


class _Process:
  """A contender at work."""

  def __init__(self, contender: Contender):
    self.contender = contender
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(contender))]
    self._errors = tempfile.TemporaryFile("w+")
    # Contenders share a GPU: none may take most of its memory before it needs it, as jax does.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
    )
    self.facts = self._answer()
    self.seconds: list[float] = []

  def ask(self, **order) -> dict:
    print(json.dumps(order), file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._errors.seek(0)
      lines = self._errors.read().strip().splitlines() or ["no message"]
      # The exception, not the advice that jax prints after it.
      raised = [text for text in lines if re.match(r"[\w.]+(Error|Exception)\b", text)] or lines
      raise RunError(f"{self.contender.name} ({self.contender.case.name}) failed: {raised[-1]}")
    return json.loads(line)

  def kill(self) -> None:
    self._process.kill()
    self._process.communicate()

  def result(self) -> Result:
    """Ends the process and sums up."""
    numbers = self.ask(end=True)
    seconds = statistics.median(self.seconds)
    low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [seconds] * 3
    flops = numbers.pop("flops", None)
    return Result(
      name=self.contender.name,
      case=self.contender.case.name,
      side=self.contender.side,
      rival=self.contender.side == "peer" and not self.contender.keep_memory,
      unit=self.facts["unit"],
      seconds=seconds,
      low=low,
      high=high,
      per_second=self.facts["amount"] / seconds,
      flops_per_second=flops and flops / seconds,
      peak_bytes=numbers.pop("peak_bytes"),
      seconds_to_first_run=self.facts["seconds_to_first_run"],
      numbers=numbers,
    )


def measure(
  contenders: Sequence[Contender], rounds: int, preset: str, note: Callable[[str], None]
) -> tuple[list[Result], float]:
  """Measures contenders by turns.

  Args:
    contenders: each gets a process; all stay alive until the end.
    rounds: turns of each, of `RUNS` timed runs.
    preset: decides the sizes of the dense product that stands for the machine's peak.
    note: is told about progress.

  Returns:
    Results in the contenders' order, and the peak: the best dense product of any side before, between and after the
    runs, in FLOP/s.

  Raises:
    RunError: a contender failed.
  """
  processes, peak = [], 0.0
  try:
    for contender in contenders:
      note(f"building {contender.name}, {contender.case.name}")
      processes.append(_Process(contender))
    one_of_each_side = list({p.contender.side: p for p in processes}.values())
    for done in range(rounds):
      if done in (0, rounds // 2, rounds - 1):
        products = [p.ask(matmul=size) for p in one_of_each_side for size in PEAK_SIZES[preset]]
        peak = max(peak, *(product["flops_per_second"] for product in products))
      for process in processes:
        time.sleep(PAUSE)
        process.seconds += process.ask(run=RUNS)["seconds"]
      note(f"round {done + 1} of {rounds}: " + "  ".join(f"{p.seconds[-1]:.3g} s" for p in processes))
    return [process.result() for process in processes], peak
  finally:
    for process in processes:
      process.kill()
