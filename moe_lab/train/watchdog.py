"""A process that hangs ends with a line, instead of holding its machines until somebody looks.

Heartbeats find a process that is gone. One that lives and waits for ever (for a collective that another host never
joins, for a disk that does not answer) beats on.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moe_lab.errors import RunError

_TICK = 1.0  # seconds
_LAST_WORDS = 5.0  # seconds


class Watchdog:
  """While entered, ends the process when a thing watched, and what follows it, takes too long.

  Seconds are counted in ticks of its own thread, so that a process that was suspended as a whole has not hung.
  """

  def __init__(self, seconds: float, workdir: Path, process: int = 0):
    """Args: seconds: that each thing may take; workdir: for the stacks of a hung process; process: its number."""
    self._seconds, self._path, self._process = seconds, workdir / f"hung-{process}.txt", process
    self._doing, self._waited, self._done = "the start", 0.0, threading.Event()
    self._thread = threading.Thread(target=self._count, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    self._thread.join()

  def watched(self, name: str, function: Callable) -> Callable:
    """Returns `function`; each call is a thing of this name, which begins there."""

    def call(*args, **kwargs):
      self._doing, self._waited = name, 0.0
      return function(*args, **kwargs)

    return call

  def _count(self) -> None:
    tick = min(_TICK, self._seconds / 4)
    while not self._done.wait(tick):
      self._waited += tick
      if self._waited >= self._seconds:
        self._give_up()

  def _give_up(self) -> None:
    kept = f"; where it hangs is in {self._path}" if _done_soon(self._write_stacks) else ""
    line = (
      f"error: --step_timeout={self._seconds:g}: process {self._process} hangs in {self._doing} or right after it"
      f"{kept}. The same command goes on from the last checkpoint\n"
    )
    _done_soon(lambda: (sys.stderr.write(line), sys.stderr.flush()))
    if self._process == 0:
      time.sleep(_LAST_WORDS)  # the others end with this one, and theirs may be the stacks that say why
    os._exit(RunError.exit_code)  # a main thread that hangs hears no exception

  def _write_stacks(self) -> None:
    with self._path.open("w") as file:
      faulthandler.dump_traceback(file)


def _done_soon(function: Callable) -> bool:
  """Calls it and returns whether it was done in little time: the disk may be what hangs, or who reads stderr."""
  done = threading.Event()

  def call() -> None:
    with contextlib.suppress(OSError):
      function()
      done.set()

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(_LAST_WORDS)
  return done.is_set()
