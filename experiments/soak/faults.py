"""What happens to the run, and what is promised of it then (docs/reliability.md).

Each fault takes the run while it trains, sees to it that what is promised comes about, leaves it started again or still
running, and returns what it saw in words.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.soak.run import Run
from moe_lab.errors import RunError
from moe_lab.io.checkpoint import saved_steps

# Of the run, in seconds: shorter than the faults are apart. The first start from a checkpoint compiles.
STEP_TIMEOUT = 60


def killed(run: Run, rng: random.Random) -> str:
  run.kill()
  run.start()
  return "killed"


def killed_in_a_save(run: Run, rng: random.Random) -> str:
  checkpoints = run.workdir / "checkpoints"
  run.wait_for(lambda: any(checkpoints.glob("*tmp*")), "a save")
  run.kill()
  left = [path.name.partition(".")[0] for path in checkpoints.glob("*tmp*")]
  run.start()
  return f"the save of step {left[0]} was half done" if left else "the save was done by then"


def told_to_stop(run: Run, rng: random.Random) -> str:
  run.process.terminate()
  run.ends(75)
  run.start()
  return "exit code 75"


def suspended(run: Run, rng: random.Random) -> str:
  # For longer than the watchdog waits: a process that is suspended as a whole has not hung.
  run.process.send_signal(signal.SIGSTOP)
  time.sleep(STEP_TIMEOUT + 2)
  run.process.send_signal(signal.SIGCONT)
  resumed = time.time()
  run.wait_for(lambda: run.trains(resumed), "steps after it was suspended")
  return f"went on after {STEP_TIMEOUT + 2} seconds"


def disk_that_does_not_answer(run: Run, rng: random.Random) -> str:
  run.wait_for(lambda: bool(saved_steps(run.workdir)), "a checkpoint")
  run.kill()
  # A pipe that nobody writes to: who opens it to read waits for ever, as for a disk of another machine.
  file = _newest(run) / "meta" / "metadata"
  kept = file.replace(run.workdir.with_name("kept"))
  os.mkfifo(file)
  run.start()
  line = run.ends(1, f"--step_timeout={STEP_TIMEOUT}: process 0 hangs in the start")
  file.unlink()
  kept.replace(file)
  run.start()
  return line


def flipped_byte(run: Run, rng: random.Random) -> str:
  def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1 << rng.randrange(8)
    file.write_bytes(content)

  return _damaged(run, flip)


def cut_short(run: Run, rng: random.Random) -> str:
  return _damaged(run, lambda file: os.truncate(file, rng.randrange(file.stat().st_size)))


def deleted(run: Run, rng: random.Random) -> str:
  return _damaged(run, Path.unlink)


def no_room(run: Run, rng: random.Random) -> str:
  # A limit on the size of its files, which needs no root: the next record is too much, as on a disk that is full.
  size = (run.workdir / "metrics.jsonl").stat().st_size
  resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size, size))
  line = run.ends(1, "File too large")
  run.start()
  return line


def second_run(run: Run, rng: random.Random) -> str:
  line = run.another(2, f"{run.workdir} is in use by process {run.process.pid}")
  refused = time.time()
  run.wait_for(lambda: run.trains(refused), "steps after another one was refused")
  return line


FAULTS: dict[str, Callable[[Run, random.Random], str]] = {
  "kill -9": killed,
  "kill -9 in a save": killed_in_a_save,
  "SIGTERM": told_to_stop,
  "suspended": suspended,
  "a disk that does not answer": disk_that_does_not_answer,
  "a flipped byte": flipped_byte,
  "a file cut short": cut_short,
  "a file deleted": deleted,
  "no room for its files": no_room,
  "a second run": second_run,
}


def in_turns(rng: random.Random) -> Iterator[str]:
  """Yields names of faults without end: each once, in random order, before any comes again."""
  while True:
    yield from rng.sample(list(FAULTS), len(FAULTS))


def _newest(run: Run) -> Path:
  return run.workdir / "checkpoints" / str(saved_steps(run.workdir)[-1])


def _damaged(run: Run, damage: Callable[[Path], None]) -> str:
  """Damages the newest checkpoint's arrays while the run is down; it has to go back to the one before, and say so."""
  run.wait_for(lambda: len(saved_steps(run.workdir)) > 1, "two checkpoints")
  run.kill()
  older, newest = saved_steps(run.workdir)[-2:]
  damage(max((_newest(run) / "state").rglob("d/*"), key=lambda path: path.stat().st_size))
  run.start()
  run.wait_for(run.trains, f"steps after the checkpoint of step {newest} was damaged")
  said = run.log.read_text(errors="replace")
  for words in (f"checkpoints/{newest} cannot be read", f"going back to step {older}"):
    if words not in said:
      raise RunError(f"wanted {words!r}, for the checkpoint of step {newest} was damaged; see {run.log}")
  return f"from step {newest} back to {older}"
