"""Does a run come out of an hour of faults as if there had been none? Kills, damaged checkpoints, hangs, all in turns.

    python -m experiments.soak.study --workdir=runs/soak

Trains configs/soak.py on CPU twice for the same steps: calmly, and with a fault every --every seconds for --minutes,
each in processes of their own, started again with the same line. What each fault is promised to do is checked. Every
step's record, those of steps that were done again too, and the last checkpoint have to be the calm run's bit for bit:
else it ends with the first difference, exit code 1. All faults, and what came of them, are in WORKDIR/soak.json and
soak.html, what the processes say in WORKDIR/logs; the last line on stdout is the JSON result. Wants Linux.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import RunError, UserError

LOST = 20.0  # seconds that a fault costs about: what it does, the start, the steps done again

FLAGS = flags.FlagValues()
flags.DEFINE_float("minutes", 60.0, "For how long faults come.", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_integer("every", 120, "Seconds from one fault to the next.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the faults' order.", flag_values=FLAGS)


def main(workdir: Path) -> dict:
  """Runs the soak and returns its result."""
  from experiments.soak import page
  from experiments.soak.faults import STEP_TIMEOUT
  from experiments.soak.run import Run, train_command
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.io.writers import read_metrics

  workdir, minutes, every = workdir.absolute(), FLAGS.minutes, FLAGS.every
  if every >= 60 * minutes:
    raise UserError(f"--every={every}: wanted less than the {60 * minutes:g} seconds of --minutes={minutes:g}")
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise UserError(f"--workdir={workdir} is there already: wanted a new or empty directory")

  # Both at once, as they will be: they share the cores.
  endless = train_command("--config.train.steps=1000000")
  with Run(endless, workdir / "rate-beside"):
    seconds = seconds_per_step(Run(endless, workdir / "rate"))
  steps = steps_within(minutes, every, seconds)
  say(f"{steps} steps of {seconds:.3f} seconds, calmly and beside it with faults: {minutes:g} minutes")
  asked = f"--config.train.steps={steps}"
  faulty = Run(train_command(asked, f"--step_timeout={STEP_TIMEOUT}"), workdir / "faulty")
  with Run(train_command(asked), workdir / "calm") as calm:
    faults = bring_faults(faulty, minutes, every, random.Random(FLAGS.seed))
    calm.finish()
  if not faults:
    raise RunError(f"--minutes={minutes:g}: the run of {steps} steps was over before its first fault; give it more")

  differences = compared(faulty, calm)
  records, spent = list(faulty.records.values()), time_of(faulty.workdir)
  result = {
    "minutes": spent.elapsed / 60,  # of the whole run with faults
    "every": every,
    "seed": FLAGS.seed,
    "faults": dict(Counter(fault["kind"] for fault in faults)),
    "restarts": faulty.starts - 1,
    "steps": steps,
    "steps_twice": sum(record["kind"] == "train" for record in records) - steps,
    "goodput": spent.share,
    "records_compared": len(records),
    "differences": len(differences),
  }
  write_text(
    workdir / "soak.json", dump_json(result | {"all_faults": faults, "all_differences": differences}, 1) + "\n"
  )
  document = page.page_of(result, faults, differences, records, read_metrics(calm.workdir))
  write_text(workdir / "soak.html", document)
  if differences:
    raise RunError(f"{len(differences)} differences, in {workdir / 'soak.json'}; the first: {differences[0]}")
  return result | {"report": workdir / "soak.html", "workdir": workdir}


def seconds_per_step(run, steps: int = 150) -> float:
  """Returns how long a step takes with what comes between steps, evaluations and saves; stops the run after some."""
  from moe_lab.io.writers import read_metrics

  with run:
    run.wait_for(lambda: run.last().get("step", 0) >= steps, f"step {steps}")
    run.process.terminate()
    run.ends(75)
  train = [record for record in read_metrics(run.workdir) if record["kind"] == "train"]
  first, last = train[steps // 3], train[-1]  # the first ones are compiled
  return (last["time"] - first["time"]) / (last["step"] - first["step"])


def steps_within(minutes: float, every: float, seconds: float) -> int:
  """Returns how many steps of so many seconds about fill the minutes, with a fault every so many seconds."""
  return max(round(60 * minutes * max(1 - LOST / every, 0.5) / seconds), 200)


def bring_faults(run, minutes: float, every: float, rng: random.Random) -> list[dict]:
  """Runs to the end, with faults while the minutes last; returns them.

  Raises:
    RunError: one did not do what is promised.
  """
  from experiments.soak.faults import FAULTS, in_turns
  from experiments.soak.run import Finished

  faults, began = [], time.monotonic()
  with run:
    try:
      for kind in in_turns(rng):
        run.wait_for(run.trains, "its first step")
        run.runs_until(began + (len(faults) + 1) * every)
        came, at = time.monotonic(), time.time()
        if came > began + 60 * minutes:
          break
        step = run.last()["step"]
        try:
          saw = FAULTS[kind](run, rng)
          run.wait_for(run.trains, f"steps after {kind}")
        except RunError as error:
          raise RunError(f"fault {len(faults) + 1}, {kind}, at step {step}: {error}") from error
        minute, seconds = (came - began) / 60, time.monotonic() - came
        faults.append({"kind": kind, "time": at, "minute": minute, "step": step, "seconds": seconds, "saw": saw})
        say(f"{minute:6.1f} min  step {step:6}  {kind}: {saw}; trains again after {seconds:.1f} s")
      say(f"no more faults; it goes on to its end from step {run.last()['step']}")
      run.finish()
    except Finished:
      say("the run has come to its end")
  return faults


def compared(faulty, calm) -> list[str]:
  """Returns in words where the faulty run, in all that its processes ever recorded and in its end, is not the calm."""
  from experiments.soak.compare import different_ends, different_records, different_steps
  from moe_lab.io.writers import read_metrics

  wanted = read_metrics(calm.workdir)
  found = different_records(faulty.records.values(), wanted)
  found += different_steps(read_metrics(faulty.workdir), wanted)
  found += different_ends(faulty.workdir, calm.workdir)
  left = sorted(path.name for path in (faulty.workdir / "checkpoints").glob("*tmp*"))
  return found + [f"the end: {name} of a killed save is left in checkpoints" for name in left]


def time_of(workdir: Path):
  """Returns the run's Goodput."""
  from moe_lab.io.run import load_run
  from moe_lab.io.writers import read_metrics
  from moe_lab.report.goodput import goodput

  train = [record for record in read_metrics(workdir) if record["kind"] == "train"]
  return goodput(train, load_run(workdir)[1])


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
  program.run(main, FLAGS)
