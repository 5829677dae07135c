"""Runs whose disk is full, cannot be written, or has changed what it holds."""

import os
import shutil
import subprocess

import pytest

from moe_lab.io.checkpoint import saved_steps
from tests.faults.runs import Launch, assert_same_end, calm_run

STEPS = "--config.train.steps=300"


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
  return calm_run(tmp_path_factory.mktemp("disks") / "calm", STEPS)


@pytest.fixture
def small_disk(calm):
  """A folder of its own file system, with hardly any room."""
  folder = calm.parent / "disk"
  folder.mkdir()
  # A size that holds the run's records and a checkpoint or two; the cache of compiled programs is beside it.
  if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", folder]).returncode:
    folder.rmdir()
    pytest.skip("only root may make a small file system")
  yield folder
  subprocess.run(["umount", folder], check=True)
  folder.rmdir()


def error_of(launch: Launch) -> str:
  assert "Traceback" not in launch.stderr, launch.stderr
  [line] = [line for line in launch.said if line.startswith("error:")]
  return line


@pytest.mark.slow
@pytest.mark.fault("full disk")
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(calm, small_disk):
  workdir = small_disk / "run"
  environment = {"MOE_LAB_CACHE": str(calm.parent / "cache")}
  more = "--config.train.keep_checkpoints=1000"
  launch = Launch(workdir, STEPS, more, **environment)
  assert launch.end() == 1, launch.stderr
  line = error_of(launch)
  assert "No space left on device" in line or "disk" in line.lower(), line
  subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
  again = Launch(workdir, STEPS, more, **environment)
  assert again.end() == 0, again.stderr
  assert_same_end(workdir, calm)


@pytest.mark.slow
@pytest.mark.fault("read-only directory")
def test_a_read_only_disk_is_one_line(calm, small_disk):
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  launch = Launch(small_disk / "run", STEPS, MOE_LAB_CACHE=str(calm.parent / "cache"))
  assert launch.end() == 2, launch.stderr
  assert "cannot be written: Read-only file system" in error_of(launch)


@pytest.mark.slow
@pytest.mark.fault("flipped byte in a checkpoint")
def test_a_flipped_byte_in_the_newest_checkpoint_costs_its_steps_and_nothing_else(calm):
  workdir = calm.parent / "flipped"
  launch = Launch(workdir, STEPS)
  launch.wait_for(lambda: saved_steps(workdir)[1:])
  launch.process.kill()
  launch.end()
  newest = saved_steps(workdir)[-1]
  data = max((workdir / "checkpoints" / str(newest) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(bytes(content))
  again = Launch(workdir, STEPS)
  assert again.end() == 0, again.stderr
  assert f"checkpoints/{newest} cannot be read" in again.stderr and "going back to step" in again.stderr
  assert_same_end(workdir, calm)
  assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()


@pytest.mark.slow
@pytest.mark.fault("no checkpoint is whole")
def test_nothing_left_to_go_back_to_is_one_line_and_nothing_is_removed(calm):
  workdir = calm.parent / "broken"
  shutil.copytree(calm, workdir)
  for path in (workdir / "checkpoints").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:100])
  launch = Launch(workdir, STEPS)
  assert launch.end() == 2
  assert "cannot be read" in error_of(launch)
  assert len(list((workdir / "checkpoints").iterdir())) == len(list((calm / "checkpoints").iterdir()))
