"""A process that hangs ends with a line; one that gets on, or was suspended, does not."""

import os
import subprocess
import sys
import threading

import pytest

from moe_lab.train.watchdog import Watchdog

HANGS = """
import sys, threading, time
from pathlib import Path
from moe_lab.train.watchdog import Watchdog

def waits_for_ever():
  threading.Event().wait()

with Watchdog(0.5, Path(sys.argv[1]), 3) as watchdog:
  watchdog.watched("a training step", lambda: None)()
  waits_for_ever()
"""


def test_a_process_that_hangs_ends_and_says_where(tmp_path):
  done = subprocess.run([sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, timeout=60)
  assert done.returncode == 1
  [line] = done.stderr.splitlines()
  assert line.startswith("error: --step_timeout=0.5: process 3 hangs in a training step or right after it")
  assert "waits_for_ever" in (tmp_path / "hung-3.txt").read_text()


def test_a_disk_that_hangs_too_keeps_no_process(tmp_path):
  done = subprocess.run([sys.executable, "-c", HANGS, tmp_path / "absent"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 1 and "process 3 hangs" in done.stderr


TALKS = """
import sys
from pathlib import Path
from moe_lab.train.watchdog import Watchdog

with Watchdog(0.5, Path(sys.argv[1]), 3):
  while True:
    print("step", file=sys.stderr)
"""


def test_who_no_longer_reads_stderr_keeps_no_process(tmp_path):
  process = subprocess.Popen([sys.executable, "-c", TALKS, tmp_path], stderr=subprocess.PIPE)
  try:
    assert process.wait(60) == 1
  finally:
    process.kill()
    process.stderr.close()
  assert 'File "<string>", line 8 in <module>' in (tmp_path / "hung-3.txt").read_text()


def test_a_disk_that_does_not_answer_keeps_no_process(tmp_path):
  os.mkfifo(tmp_path / "hung-3.txt")  # who opens it waits for a reader
  done = subprocess.run([sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, timeout=60)
  assert done.returncode == 1
  [line] = done.stderr.splitlines()
  assert "process 3 hangs in a training step or right after it. The same command" in line


def test_who_gets_on_is_left_alone(tmp_path, monkeypatch):
  given_up = []
  monkeypatch.setattr(Watchdog, "_give_up", lambda self: given_up.append(self._doing))
  with Watchdog(0.4, tmp_path) as watchdog:
    step = watchdog.watched("a step", lambda seconds: threading.Event().wait(seconds))
    for _ in range(8):
      step(0.1)
    assert not given_up
    step(2.0)
  assert given_up and set(given_up) == {"a step"}
  assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_results_and_errors_come_through(tmp_path):
  with Watchdog(60, tmp_path) as watchdog:
    assert watchdog.watched("adding", lambda a, b=0: a + b)(2, b=3) == 5
    with pytest.raises(ZeroDivisionError):
      watchdog.watched("dividing", lambda: 1 / 0)()
