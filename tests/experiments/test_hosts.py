"""`experiments.train` as two processes: preempted at one, continued by two and by one, ended by a host that dies."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moe_lab.io.writers import read_metrics
from tests import two_processes

ARGUMENTS = [
  "-m",
  "experiments.train",
  f"--config={two_processes.ROOT}/configs/quickstart.py",
  "--config.model.dim=16",
  "--config.model.num_layers=2",
  "--config.model.num_experts=4",
  "--config.model.expert_dim=8",
  "--config.model.head_dim=8",
  "--config.routing.method=topk",
  "--config.routing.k=2",
  "--config.routing.k_max=4",
  "--config.data.sources=text:text",
  "--config.data.vocab_size=300",
  "--config.data.seq_len=32",
  "--config.train.steps=60",
  "--config.train.batch_size=8",
  "--config.train.log_every=5",
  "--config.train.eval_every=30",
  "--config.train.eval_batches=1",
  "--config.train.checkpoint_every=25",
]


@pytest.fixture
def place(tmp_path):
  """A folder with a corpus."""
  (tmp_path / "text").mkdir()
  for index in range(40):
    lines = [f"def function_{index}_{line}(x):\n  return x + {index * line}\n" for line in range(30)]
    (tmp_path / "text" / f"{index}.py").write_text("\n".join(lines))
  return tmp_path


def start(place, *arguments, second=""):
  cache = str(place / "cache")
  return two_processes.start(*ARGUMENTS, *arguments, folder=place, second=second, MOE_LAB_CACHE=cache)


def alone(place, *arguments):
  """Trains in one process with eight devices."""
  flags = {"JAX_NUM_CPU_DEVICES": "8", "MOE_LAB_CACHE": str(place / "cache")}
  environment = two_processes.ENVIRONMENT | flags
  command = [sys.executable, *ARGUMENTS, *arguments]
  done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def wait_for(path, processes):
  deadline = time.monotonic() + 600
  while not path.exists():
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes), [
      process.communicate() for process in processes if process.poll() is not None
    ]
    time.sleep(0.05)


def result_of(ended):
  code, stdout, stderr = ended
  assert code == 0, stderr
  return json.loads(stdout.splitlines()[-1])


@pytest.mark.fault("one of two processes gets SIGTERM")
@pytest.mark.slow
def test_what_one_host_is_told_all_do_and_any_number_goes_on(place):
  processes = start(place, "--workdir=two")
  wait_for(place / "two" / "metrics.jsonl", processes)
  processes[1].send_signal(signal.SIGTERM)
  stopped = two_processes.ends(processes)
  assert [code for code, _, _ in stopped] == [75, 75], stopped
  assert "stopped at step" in stopped[0][2] and "stopped at step" not in stopped[1][2]
  assert not (place / "two" / "lock").exists()
  (step,) = (int(path.name) for path in (place / "two" / "checkpoints").iterdir())
  assert 0 < step < 60
  shutil.copytree(place / "two", place / "then_one")

  first, second = two_processes.ends(start(place, "--workdir=two"))
  two = result_of(first)
  assert second[0] == 0 and "{" not in second[1] and "step" not in second[2], second
  one, then_one = (result_of(alone(place, f"--workdir={name}")) for name in ("one", "then_one"))
  for other in (two, then_one):
    assert other["steps"] == one["steps"] == 60
    assert other["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)
    assert other["bigram_loss"] == one["bigram_loss"]

  positions = []
  for name in ("one", "two", "then_one"):
    records = [(record["kind"], record["step"]) for record in read_metrics(place / name)]
    assert len(set(records)) == len(records), records
    assert {("train", logged) for logged in range(5, 61, 5)} <= set(records)
    side = json.loads((place / name / "checkpoints" / "60" / "meta" / "metadata").read_text())
    positions.append(side["meta"]["loader"])
  # The position in the data is the same however many hosts have read them.
  assert positions[0] == positions[1] == positions[2]
  run = json.loads((place / "two" / "run.json").read_text())
  assert len(run["launches"]) == 2 and run["launches"][1]["processes"] == 2
  assert run["devices"] == [{"platform": "cpu", "kind": "cpu", "count": 8}]
  assert (place / "two" / "report.html").exists() and len(list((place / "two" / "tensorboard").iterdir())) == 2


@pytest.mark.fault("one of two processes killed")
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_leaves_no_other_waiting(place, victim):
  processes = start(place, "--workdir=run", "--config.train.steps=1000000", "--heartbeat_timeout=10")
  wait_for(place / "run" / "tensorboard", processes)  # it trains
  processes[victim].kill()
  began = time.monotonic()
  code = processes[1 - victim].wait(timeout=120)
  two_processes.ends(processes)
  assert code not in (0, 75) and time.monotonic() - began < 60


HANGS = """
import runpy, sys, threading
from moe_lab.data.iterator import Loader
if "--process_id=1" in sys.argv:
  whole, left = Loader.__next__, iter(range(4))
  def fifth_batch_never_comes(self):
    return whole(self) if next(left, None) is not None else threading.Event().wait()
  Loader.__next__ = fifth_batch_never_comes
runpy.run_module("experiments.train", run_name="__main__")
"""


@pytest.mark.fault("one of two processes hangs")
@pytest.mark.slow
def test_a_host_that_hangs_but_lives_ends_with_all_others(place):
  (place / "hangs.py").write_text(HANGS)
  command = ["hangs.py", *ARGUMENTS[2:], "--workdir=run", "--config.train.steps=1000000"]
  # Enough for the start and the first step, which is compiled.
  processes = two_processes.start(*command, "--step_timeout=150", folder=place, MOE_LAB_CACHE=str(place / "cache"))
  ended = two_processes.ends(processes)
  assert all(code not in (0, 75) for code, _, _ in ended)
  assert any("error: --step_timeout=150: process" in stderr for _, _, stderr in ended), ended
  assert "fifth_batch_never_comes" in (place / "run" / "hung-1.txt").read_text()


@pytest.mark.fault("hosts with other configurations")
@pytest.mark.slow
def test_hosts_that_differ_are_refused_by_all(place):
  for code, _, stderr in two_processes.ends(start(place, "--workdir=run", second="--config.train.seed=5")):
    assert code == 2 and "error: the configuration: process 1 has something else" in stderr, stderr
  assert not (place / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_come_are_not_waited_for(place):
  processes = start(place, "--workdir=run", "--initialization_timeout=3")
  processes[1].kill()
  code, stdout, stderr = two_processes.ends(processes[:1])[0]
  assert code == 2 and stdout == ""
  assert stderr.splitlines()[-1].startswith("error: --initialization_timeout=3: process 0 of 2 waited")
