"""A contender's process: builds its work once, then runs it when the parent says so.

Contenders live in processes of their own, so that neither's threads, allocator
or compiler disturb the other's and each one's peak memory can be told; the
parent lets them take turns, so that a machine that slows down slows all.

Lines on stdin: {"run": N} times N runs after one that finds its memory cold,
{"matmul": SIZE} a dense product, {"end": true} reports and ends. Each is
answered by one line of JSON on stdout.
"""

import dataclasses
import importlib
import json
import os
import resource
import sys
import time
from typing import TextIO

from absl import flags

from benchmarks.case import Case
from benchmarks.work import Work
from moe_lab.config.program import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class Contender:
  """Who is measured.

  Attributes:
    side: ours | peer: the module that builds its work.
    benchmark: a name in that module's BENCHMARKS.
    case: the shapes and the routing.
    variant: which of a side's implementations, where it has several.
    keep_memory: whether a peer's glibc keeps what is freed, too (`keep_freed_memory`).
  """

  side: str
  benchmark: str
  case: Case
  variant: str = ""
  keep_memory: bool = False

  @property
  def name(self) -> str:
    """For tables."""
    if self.side == "ours":
      return "moe_lab" + (f" {self.variant}" if self.variant else "")
    return " ".join(["transformers" if self.variant else "torch", self.variant]).strip() + (
      ", memory kept" if self.keep_memory else ""
    )


def resident() -> int:
  """Returns the most bytes of main memory this process held so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def own_stdout() -> TextIO:
  """Returns stdout for answers alone: what libraries print goes to stderr from here on."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  return answers


def timed(work: Work, runs: int) -> list[float]:
  """Returns the seconds of each of so many runs."""
  seconds = []
  for _ in range(runs):
    started = time.perf_counter()
    work.run()
    seconds.append(time.perf_counter() - started)
  return seconds


def main() -> None:
  """Serves one contender, given as JSON in the first argument."""
  answers = own_stdout()
  flags.FLAGS.mark_as_parsed()  # libraries look up flags of their own there
  given = json.loads(sys.argv[1])
  contender = Contender(**given | {"case": Case(**given["case"])})
  if contender.keep_memory or contender.side == "ours":  # as our programs do
    keep_freed_memory(one_arena=contender.benchmark != "decode")
  side = importlib.import_module(f"benchmarks.{contender.side}")
  before, started = resident(), time.perf_counter()
  work = side.BENCHMARKS[contender.benchmark](contender.case, contender.variant)

  def uncounted():
    work.run()
    work.forget()

  uncounted()  # compiles

  def answer(**fields):
    print(json.dumps(fields), file=answers, flush=True)

  answer(unit=work.unit, amount=work.amount, seconds_to_first_run=time.perf_counter() - started)
  for line in sys.stdin:
    order = json.loads(line)
    if "run" in order:
      uncounted()
      answer(seconds=timed(work, order["run"]))
    elif "matmul" in order:
      product = side.matmul(order["matmul"], contender.case.dtype)
      product.run()
      answer(flops_per_second=product.report()["flops"] / min(timed(product, 8)))
    else:
      peak = side.memory() or resident() - before
      answer(peak_bytes=peak, **work.report())
      return


if __name__ == "__main__":
  main()
