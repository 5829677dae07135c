import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest

from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.errors import UserError
from moe_lab.io import run as run_lib

FINGERPRINT = "a1" * 32


def start(workdir, config=None, fingerprint=FINGERPRINT):
  return run_lib.open_run(
    workdir,
    config or Config(),
    fingerprint=fingerprint,
    manifest=[{"file": "a.py", "documents": 3}],
    argv=["train.py", "--config=x y"],
  )


def snapshot(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(match, workdir, **kwargs):
  before = snapshot(workdir) if workdir.is_dir() else None
  with pytest.raises(UserError, match=match) as caught:
    start(workdir, **kwargs)
  assert "\n" not in str(caught.value)
  if before is not None:
    assert snapshot(workdir) == before
  return str(caught.value)


def test_record_of_a_run(tmp_path):
  workdir = tmp_path / "runs" / "a"
  with start(workdir) as run:
    assert not run.resumed
    run.note(attention="blocked")
  config, info = run_lib.load_run(workdir)
  assert config == Config()
  assert info["data"] == [{"file": "a.py", "documents": 3}]
  assert info["tokenizer_fingerprint"] == FINGERPRINT
  assert info["command"] == "train.py '--config=x y'"
  assert info["attention"] == "blocked"
  assert info["devices"][0]["count"] >= 1
  assert {"git_hash", "git_dirty", "host", "started"} <= info.keys()
  assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "moe_lab"} <= info["versions"].keys()
  assert [launch["step"] for launch in info["launches"]] == [0]
  assert sorted(p.name for p in workdir.iterdir()) == ["config.json", "run.json"]


def test_continuing_appends_a_launch_and_may_change_the_cadence(tmp_path):
  start(tmp_path).close()
  (tmp_path / "checkpoints" / "40").mkdir(parents=True)
  (tmp_path / "checkpoints" / "40" / "data").touch()
  other = Config(train=TrainConfig(log_every=1, eval_every=3, eval_batches=1, checkpoint_every=7, keep_checkpoints=9))
  with start(tmp_path, other) as run:
    assert run.resumed
  config, info = run_lib.load_run(tmp_path)
  assert config == other
  assert [launch["step"] for launch in info["launches"]] == [0, 40]


def test_another_configuration_is_refused(tmp_path):
  start(tmp_path).close()
  message = refuse(
    r"config.model.dim = 64, but the run in .* has 128", tmp_path, config=Config(model=ModelConfig(dim=64))
  )
  assert str(tmp_path) in message
  both = Config(routing=RoutingConfig(budget=3.0), train=TrainConfig(steps=5))
  assert "and config" not in refuse(r"and train\.steps", tmp_path, config=both)


def test_another_tokenizer_is_refused(tmp_path):
  start(tmp_path).close()
  message = refuse("tokenizer b2b2b2b2b2b2 is not a1a1a1a1a1a1", tmp_path, fingerprint="b2" * 32)
  assert "b2" * 7 not in message


def test_other_places_are_refused(tmp_path):
  file = tmp_path / "file"
  file.write_text("x")
  refuse("is a file", file)
  refuse("cannot be written", file / "below")
  assert file.read_text() == "x"
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "thesis.txt").write_text("x")
  refuse(r"holds other files \(thesis.txt", folder)


def test_a_start_killed_before_its_config_can_start_again(tmp_path):
  (tmp_path / "run.json").write_text("{}")
  (tmp_path / "lock").write_text('{"ho')
  start(tmp_path).close()
  run_lib.load_run(tmp_path)


def test_damaged_records_are_named(tmp_path):
  start(tmp_path).close()
  saved = (tmp_path / "run.json").read_text()
  (tmp_path / "run.json").write_text("[1")
  refuse("cannot be read", tmp_path)
  (tmp_path / "run.json").write_text(saved)
  (tmp_path / "config.json").write_text('{"model": {"dmi": 3}, "routing": {}, "data": {}, "train": {}}')
  with pytest.raises(UserError, match=r"config\.json.*dmi"):
    run_lib.load_run(tmp_path)


def test_the_second_process_refuses(tmp_path):
  with start(tmp_path):
    message = refuse(f"in use by process {os.getpid()} on ", tmp_path)
    assert str(tmp_path / "lock") in message
  assert not (tmp_path / "lock").exists()
  start(tmp_path).close()


@pytest.mark.fault("two runs in one directory")
def test_stale_locks_are_taken_over_and_foreign_ones_believed(tmp_path):
  start(tmp_path).close()
  lock = tmp_path / "lock"
  with start(tmp_path):
    held = json.loads(lock.read_text())
  child = subprocess.Popen([sys.executable, "-c", ""])
  child.wait()
  lock.write_text(json.dumps({**held, "pid": child.pid, "born": 1}))
  start(tmp_path).close()
  # The number lives on in another process.
  if held["born"] is not None:
    lock.write_text(json.dumps({**held, "born": held["born"] - 1}))
    start(tmp_path).close()
  lock.write_text(json.dumps({**held, "host": "elsewhere.example"}))
  refuse("on elsewhere.example", tmp_path)


def test_an_earlier_attempt_of_the_same_job_does_not_block(tmp_path, monkeypatch):
  start(tmp_path).close()
  lock = tmp_path / "lock"
  monkeypatch.setenv("MOE_LAB_JOB", "job 7")
  with start(tmp_path):
    held = json.loads(lock.read_text())
  assert held["job"] == "job 7"
  # Its node has died: the scheduler began this attempt because it knows.
  lock.write_text(json.dumps({**held, "host": "elsewhere.example"}))
  start(tmp_path).close()
  # Another job's, and one of no job, are alive for all we know.
  for job in ("job 8", None):
    lock.write_text(json.dumps({**held, "host": "elsewhere.example", "job": job}))
    refuse("on elsewhere.example", tmp_path)
  # Here it is waited for: some seconds to be gone, and refused if it stays.
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
  reaper = threading.Thread(target=child.wait)
  reaper.start()
  lock.write_text(json.dumps({**held, "pid": child.pid, "born": None}))
  start(tmp_path).close()
  assert child.poll() is not None
  reaper.join()
  monkeypatch.setattr("moe_lab.io.lock._LEAVING", 0.1)
  lock.write_text(json.dumps({**held, "pid": os.getppid(), "born": None}))
  refuse(f"in use by process {os.getppid()}", tmp_path)


def test_a_lock_taken_by_another_is_not_released(tmp_path):
  run = start(tmp_path)
  (tmp_path / "lock").write_text(json.dumps({"host": "h", "pid": 1, "token": "theirs"}))
  run.close()
  assert (tmp_path / "lock").exists()


@pytest.mark.fault("two runs in one directory")
def test_one_of_many_takes_over_a_stale_lock(tmp_path):
  (tmp_path / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "token": "old"}))
  program = (
    "import sys, pathlib\n"
    "from moe_lab.errors import UserError\n"
    "from moe_lab.io.lock import RunLock\n"
    "sys.stdin.readline()\n"
    "try:\n  RunLock(pathlib.Path(sys.argv[1])); print('held')\n"
    "except UserError:\n  print('refused')\n"
    "sys.stdout.flush(); sys.stdin.readline()\n"
  )
  tries = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(6)
  ]
  for process in tries:
    process.stdin.write("go\n")
    process.stdin.flush()
  said = [process.stdout.readline().strip() for process in tries]
  for process in tries:
    process.communicate("end\n")
  assert sorted(said) == ["held"] + ["refused"] * 5


def test_a_missing_run_names_the_nearest(tmp_path):
  start(tmp_path / "quickstart").close()
  with pytest.raises(UserError, match="did you mean 'quickstart'"):
    run_lib.load_run(tmp_path / "quikstart")
  with pytest.raises(UserError, match="holds the runs quickstart"):
    run_lib.load_run(tmp_path)
  with pytest.raises(UserError, match="no such directory"):
    run_lib.load_run(tmp_path / "x" / "y" / "z")


def test_a_run_may_go_on_on_other_devices(tmp_path):
  start(tmp_path / "run").close()
  start(tmp_path / "run", Config(mesh=MeshConfig(expert=4))).close()
  assert run_lib.load_run(tmp_path / "run")[0].mesh.expert == 4


def test_cadence_fields_exist():
  assert {name.removeprefix("train.") for name in run_lib._CADENCE} <= {f.name for f in dataclasses.fields(TrainConfig)}
