"""Runs whose processes are killed, told to stop, and started twice."""

import json
import random
import signal
from pathlib import Path

import pytest

from moe_lab.io.writers import read_metrics
from tests.faults.runs import Launch, assert_same_end, calm_run

STEPS = "--config.train.steps=1500"
KILLS = 20


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
  return calm_run(tmp_path_factory.mktemp("faults") / "calm", STEPS)


def reached(workdir) -> int:
  return max((record["step"] for record in read_metrics(workdir)), default=0)


def gets_on(workdir):
  """Returns a function that says whether there are records of later steps than there are now."""
  before = reached(workdir)
  return lambda: reached(workdir) > before


@pytest.mark.slow
@pytest.mark.fault("kill -9 at 20 random moments")
def test_killed_at_twenty_random_moments_it_ends_as_if_it_had_not_been(calm):
  workdir, rng, steps = calm.parent / "killed", random.Random(0), []
  for number in range(KILLS):
    launch = Launch(workdir, STEPS)
    if number % 2:  # among steps and saves; the others at any time, most of which is the start
      launch.wait_for(gets_on(workdir))
      launch.go_on(rng.uniform(0.0, 0.5))
    else:
      launch.go_on(rng.uniform(0.0, 8.0))
    launch.process.kill()
    assert launch.end() in (-signal.SIGKILL, 0), launch.stderr
    assert "Traceback" not in launch.stderr, launch.stderr
    steps.append(reached(workdir))
  launch = Launch(workdir, STEPS)
  assert launch.end() == 0, launch.stderr
  assert_same_end(workdir, calm)
  assert not list((workdir / "checkpoints").glob("*tmp*"))
  assert len(set(steps)) > 3, steps  # it was killed on its way, and not only at its start or after its end


def hears(pid: int, number: int) -> bool:
  """Whether a process has a handler for a signal."""
  lines = Path(f"/proc/{pid}/status").read_text().splitlines()
  caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
  return bool(caught >> number - 1 & 1)


# What to wait for before SIGTERM, by phase.
PHASES = {
  "start": lambda launch, workdir: launch.wait_for(lambda: hears(launch.process.pid, signal.SIGTERM)),
  "compiling": lambda launch, workdir: launch.wait_for((workdir / "run.json").exists),
  "a step": lambda launch, workdir: launch.wait_for(lambda: reached(workdir) > 0),
  "a save": lambda launch, workdir: launch.wait_for(lambda: any((workdir / "checkpoints").glob("*tmp*"))),
  "an evaluation": lambda launch, workdir: launch.wait_for(lambda: reached(workdir) >= 190),
  "the last evaluation": lambda launch, workdir: launch.wait_for(lambda: "evaluating on" in launch.stderr),
}


@pytest.mark.slow
@pytest.mark.fault("SIGTERM in every phase")
@pytest.mark.parametrize("phase", PHASES)
def test_told_to_stop_it_saves_and_goes_on_exactly(calm, phase):
  workdir = calm.parent / phase.replace(" ", "_")
  launch = Launch(workdir, STEPS)
  PHASES[phase](launch, workdir)
  launch.process.terminate()
  code = launch.end()
  # Once all steps are done there is nothing left to save: it may as well come to its end.
  assert code == 75 or (code == 0 and phase == "the last evaluation"), launch.stderr
  assert "Traceback" not in launch.stderr
  again = Launch(workdir, STEPS)
  assert again.end() == 0, again.stderr
  assert_same_end(workdir, calm)


@pytest.mark.slow
@pytest.mark.fault("two runs in one directory")
def test_the_second_of_two_refuses_and_the_first_does_not_notice(calm):
  workdir = calm.parent / "twice"
  first = Launch(workdir, STEPS)
  first.wait_for(lambda: reached(workdir) > 0)
  second = Launch(workdir, STEPS)
  assert second.end() == 2
  [line] = [line for line in second.said if line.startswith("error:")]
  assert f"{workdir} is in use by process {first.process.pid}" in line
  assert first.end() == 0, first.stderr
  assert_same_end(workdir, calm)


@pytest.mark.slow
@pytest.mark.fault("another tokenizer, dtype or shape")
def test_what_does_not_fit_is_one_line(calm):
  for change in ("--config.data.vocab_size=28", "--config.model.dtype=bfloat16", "--config.model.dim=24"):
    launch = Launch(calm, STEPS, change)
    assert launch.end() == 2, launch.stderr
    [line] = [line for line in launch.said if line.startswith("error:")]
    assert change.split("=")[0].removeprefix("--") in line


@pytest.mark.slow
@pytest.mark.fault("another number of devices")
def test_begun_on_eight_devices_it_goes_on_with_four_and_with_one(calm):
  workdir = calm.parent / "devices"
  for devices in (8, 4):
    launch = Launch(workdir, STEPS, JAX_NUM_CPU_DEVICES=str(devices))
    launch.wait_for(gets_on(workdir))
    launch.process.terminate()
    assert launch.end() == 75, launch.stderr
  last = Launch(workdir, STEPS)
  assert last.end() == 0, last.stderr
  devices = [launch["devices"][0]["count"] for launch in json.loads((workdir / "run.json").read_text())["launches"]]
  assert devices == [8, 4, 1]
  ours, wanted = (json.loads((folder / "evaluation.json").read_text())["val_loss"] for folder in (workdir, calm))
  assert ours == pytest.approx(wanted, abs=1e-3)
