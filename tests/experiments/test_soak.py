"""The soak: what it holds processes to, what it sees when two runs differ, and, slowly, all of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from experiments.soak import compare, faults, page, study
from experiments.soak.run import ROOT, Finished, Run, checked
from moe_lab.errors import RunError, UserError

# A run of 100 steps that goes on where its file ends, and does as it is told.
PLAYED = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[-1].partition("=")[2])
folder.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (folder / "metrics.jsonl").open("a+") as file:
  file.seek(0)
  for step in range(len(file.readlines()), 100):
    try:
      file.write(json.dumps({"kind": "train", "step": step + 1, "time": time.time(), "loss": 1 / (step + 1)}) + "\\n")
      file.flush()
    except OSError as error:
      os.write(2, f"error: {error}\\n".encode())
      os._exit(1)
    time.sleep(0.02)
"""


@pytest.fixture
def played(tmp_path):
  with Run([sys.executable, "-c", PLAYED], tmp_path / "run") as run:
    run.wait_for(run.trains, "a step")
    yield run


def test_faults_that_do_what_is_promised(played):
  rng = random.Random(0)
  assert faults.told_to_stop(played, rng) == "exit code 75"
  played.wait_for(played.trains, "a step")
  assert "File too large" in faults.no_room(played, rng) and played.starts == 3
  assert played.process.poll() is None
  faults.killed(played, rng)
  with pytest.raises(Finished):
    played.wait_for(lambda: False, "nothing")
  assert played.last()["step"] == 100 and {step for _, step, _ in played.records} == set(range(1, 101))


def test_a_run_that_breaks_a_promise(played):
  played.process.kill()
  with pytest.raises(RunError, match="exit code -9 instead of 75; see .*run-1.txt"):
    played.ends(75)
  played.start()
  played.process.kill()
  with pytest.raises(RunError, match="exit code -9 instead of 0"):
    played.wait_for(lambda: False, "nothing")
  played.start()
  with pytest.raises(RunError, match="exit code 0 instead of 2; see .*run-3-another.txt"):
    played.process.send_signal(signal.SIGSTOP)
    played.another(2, "is in use")


def test_leaving_ends_the_process(tmp_path):
  with pytest.raises(KeyboardInterrupt), Run([sys.executable, "-c", PLAYED], tmp_path / "run") as run:
    run.process.send_signal(signal.SIGSTOP)
    raise KeyboardInterrupt
  assert run.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
  ("said", "found", "words"),
  [
    ("Traceback (most recent call last):\n", 75, "with a traceback"),
    ("error: too much\n", 0, "with 'error: too much'"),
    ("step 3\n", 1, r"with \[\] instead of one line with 'room'"),
    ("error: no room\nerror: no more\n", 1, "instead of one line with 'room'"),
    ("error: no more\n", 2, "instead of one line with 'room'"),
  ],
)
def test_what_a_process_must_not_say(tmp_path, said, found, words):
  (tmp_path / "log").write_text(said)
  with pytest.raises(RunError, match=words):
    checked(tmp_path / "log", found, found, "room")


def test_each_fault_comes_about_equally_often():
  kinds = list(islice(faults.in_turns(random.Random(0)), 35))
  assert set(Counter(kinds).values()) == {3, 4} and set(kinds) == set(faults.FAULTS)
  assert kinds == list(islice(faults.in_turns(random.Random(0)), 35))
  assert kinds != list(islice(faults.in_turns(random.Random(1)), 35))


def test_steps_fill_what_faults_leave_of_the_time():
  assert study.steps_within(60, 120, 0.5) == 6000  # 30 faults of 20 s leave 3,000 s
  assert study.steps_within(60, 15, 0.5) == 3600
  assert study.steps_within(1, 15, 5.0) == 200


def record(step, loss, at, kind="train"):
  return {"kind": kind, "step": step, "time": at, "tokens_per_second": at, "loss": loss}


CALM = [record(1, 4.0, 1.0), record(2, 3.0, 2.0), record(2, 3.5, 2.0, "eval"), record(3, 2.5, 3.0)]


def test_records_are_compared_but_for_the_clock():
  again = [record(2, 3.0, 1.5), *(one | {"time": one["time"] + 9} for one in CALM)]
  assert compare.different_records(again, CALM) == [] == compare.different_steps(again[1:], CALM)
  nearly = [record(3, 2.5, 2.0), record(2, float(np.nextafter(3.0, 4)), 1.5), record(4, 2.0, 4.0)]
  assert compare.different_records(nearly, CALM) == [
    "step 2: train loss is 3.0000000000000004, and 3.0 in the calm run",
    "step 4: a record of kind 'train', and the calm run has none",
  ]
  [line] = compare.different_records([CALM[0] | {"price": 1.0}], CALM)
  assert line == "step 1: train price is 1.0, and None in the calm run"
  [line] = compare.different_steps(again, CALM)
  assert line.startswith("step 2: 'train' is recorded where the calm run has 'train' of step 1")
  assert compare.different_steps(CALM[:3], CALM) == ["3 records, and 4 of the calm run"]


def test_states_are_compared_to_the_last_bit():
  state = {"w": np.array([0.0, 1.0], np.float32), "n": np.int32(3)}
  assert compare.different_states(state, {"w": np.array([0.0, 1.0], np.float32), "n": np.int32(3)}) == []
  [line] = compare.different_states(state, state | {"w": np.array([-0.0, 1.0], np.float32)})
  assert line == "the end: ['w'] is not the calm run's, bit for bit"
  assert len(compare.different_states(state, {"n": np.int64(3)})) == 2


def test_the_page_has_both_curves_and_every_fault():
  came = [
    {"kind": "kill -9", "time": 100.0 + minute, "minute": minute, "step": minute, "seconds": 3.0, "saw": "<killed>"}
    for minute in (1, 2)
  ]
  records = [one | {"time": one["time"] + 100} for one in CALM] + [record(2, 3.0, 102.9)]
  result = {
    "minutes": 1.0, "every": 30, "differences": 1, "records_compared": 5, "steps": 3, "steps_twice": 1,
    "restarts": 1, "goodput": 0.5,
  }  # fmt: skip
  drawn = page.page_of(result, came, ["step 2: <loss>"], records, CALM)
  for words in ("calm", "with faults", "a fault", "&lt;killed&gt;", "step 2: &lt;loss&gt;", "50%"):
    assert words in drawn
  assert drawn.count("<figure") == 2 and "None." not in drawn
  assert "None." in page.page_of(result, came, [], records, CALM)


def test_mistakes_are_a_line(tmp_path):
  (tmp_path / "mine").write_text("")
  study.FLAGS(["study", "--minutes=1", "--every=60"])
  with pytest.raises(UserError, match="--every=60: wanted less than the 60 seconds of --minutes=1"):
    study.main(tmp_path / "new")
  study.FLAGS(["study", "--minutes=1", "--every=10"])
  with pytest.raises(UserError, match="is there already: wanted a new or empty directory"):
    study.main(tmp_path)
  study.FLAGS.unparse_flags()
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_two_minutes_of_faults_leave_a_run_as_it_was(tmp_path):
  began = time.time()
  command = [sys.executable, "-m", "experiments.soak.study", "--minutes=2", "--every=15", f"--workdir={tmp_path}/soak"]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result["differences"] == 0 and sum(result["faults"].values()) > 2 and result["restarts"] > 1
  assert result["records_compared"] >= result["steps"] + result["steps_twice"] and 0 < result["goodput"] < 1
  assert (tmp_path / "soak" / "soak.html").stat().st_mtime > began
