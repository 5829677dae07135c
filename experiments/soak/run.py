"""A training run in many processes: what each says goes to a file, and whatever one has recorded is kept."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moe_lab.errors import RunError
from moe_lab.io.writers import read_metrics

ROOT = Path(__file__).parents[2]
_PATIENCE = 600.0  # seconds for what takes some at the worst
_LOOK = 0.005  # seconds between two looks at what is waited for
_TAIL = 2**16  # bytes that hold the last record


class Finished(Exception):
  """The run has come to its end."""


class Run:
  """A run of `experiments.train` and its present process; leaving the context ends that.

  Attributes:
    workdir: the run's.
    process: the newest one.
    log: what it says.
    starts: how many processes there were.
    records: all that its processes have recorded up to their ends, also what was dropped and done again.
  """

  def __init__(self, command: list[str], workdir: Path):
    """Args: command: without `--workdir`, always the same; workdir: logs are beside it."""
    self.workdir = workdir
    self.starts, self.records = 0, {}
    self._command = [*command, f"--workdir={workdir}"]
    self.process, self.log, self._began = None, None, 0.0

  def start(self) -> None:
    """Starts it, for the first time or again."""
    self.starts += 1
    self.log, self._began = self._new_log(str(self.starts)), time.time()
    self.process = self._launch(self.log)

  def __enter__(self) -> "Run":
    self.start()
    return self

  def __exit__(self, *_) -> None:
    if self.process.poll() is None:
      self.process.kill()
      self.process.wait()

  def last(self) -> dict:
    """Returns the newest record; {} before there is one."""
    try:
      with (self.workdir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
      return {}
    return json.loads(lines[-1]) if lines else {}

  def trains(self, since: float = 0.0) -> bool:
    """Whether the present process has recorded a step, and done so after `since` (of `time.time()`)."""
    return self.last().get("time", 0.0) > max(self._began, since)

  def wait_for(self, happened: Callable[[], bool], what: str) -> None:
    """Returns once it has happened.

    Raises:
      Finished: the run came to its end before.
      RunError: it ended otherwise, or nothing has happened for too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while not happened():
      if self.process.poll() is not None:
        self.ends(0)
        raise Finished
      if time.monotonic() > deadline:
        raise RunError(f"waited {_PATIENCE:g} seconds for {what}, in vain; what it says is in {self.log}")
      time.sleep(_LOOK)

  def runs_until(self, moment: float) -> None:
    """Returns at a moment of `time.monotonic()`; raises as `wait_for` does."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(max(0.0, moment - time.monotonic()))
      self.wait_for(lambda: False, "its end")

  def ends(self, code: int, words: str = "") -> str:
    """Waits for the end of its process and holds it to what is promised; returns the line that it ends with.

    Args:
      code: that it is to exit with; -9: it was killed.
      words: that the line has to hold.

    Raises:
      Finished: the run came to its end before it could end so.
      RunError: it ended in another way.
    """
    found = self._end_of(self.process, self.log)
    for record in read_metrics(self.workdir):
      self.records[record["kind"], record["step"], record["time"]] = record
    line = checked(self.log, found, 0 if found == 0 else code, words)
    if found == 0 != code:
      raise Finished
    return line

  def kill(self) -> None:
    """Ends it as `kill -9` does."""
    self.process.send_signal(signal.SIGKILL)
    self.ends(-signal.SIGKILL)

  def another(self, code: int, words: str) -> str:
    """Starts the same once more beside it, and holds that one to what is promised as `ends` does; returns its line."""
    log = self._new_log(f"{self.starts}-another")
    process = self._launch(log)
    try:
      found = self._end_of(process, log)
    finally:
      process.kill()
      process.wait()
    if self.process.poll() is not None:
      self.ends(0)
      raise Finished
    return checked(log, found, code, words)

  def _end_of(self, process: subprocess.Popen, log: Path) -> int:
    try:
      return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      raise RunError(f"process {process.pid} did not end within {_PATIENCE:g} seconds; see {log}") from None

  def _new_log(self, name: str) -> Path:
    folder = self.workdir.with_name("logs")
    folder.mkdir(parents=True, exist_ok=True)
    base, number = f"{self.workdir.name}-{name}", 1
    while (path := folder / f"{base}{'' if number == 1 else f'-{number}'}.txt").exists():
      number += 1
    return path

  def _launch(self, log: Path) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("MOE_LAB_JOB", None)  # else the second of two would take itself for another attempt at one job
    with log.open("w") as file:
      return subprocess.Popen(self._command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def train_command(*arguments: str) -> list[str]:
  config = ROOT / "configs/soak.py"
  return [sys.executable, "-m", "experiments.train", f"--config={config}", "--num_processes=1", *arguments]


def checked(log: Path, found: int, code: int, words: str) -> str:
  """Returns the line that a process has ended with ("" where none is promised).

  Raises:
    RunError: its exit code or what it said is not as promised: a trace, or not the one line of an error.
  """
  said = log.read_text(errors="replace")
  lines = [line for line in said.splitlines() if line.startswith("error:")]
  if found != code:
    raise RunError(f"exit code {found} instead of {code}{f': {lines[-1]}' if lines else ''}; see {log}")
  if "Traceback" in said:
    raise RunError(f"exit code {found} as promised, but with a traceback; see {log}")
  if code in (1, 2):
    if len(lines) != 1 or words not in lines[0]:
      raise RunError(f"exit code {found} as promised, but with {lines} instead of one line with {words!r}; see {log}")
    return lines[0]
  if lines:
    raise RunError(f"exit code {found} as promised, but with {lines[0]!r}; see {log}")
  return ""
