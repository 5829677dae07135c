"""The sweep program: mistakes before anything starts, no run done twice, and the same runs by every launcher."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import sweep_run
from moe_lab.config.sweep import load_sweep
from tests.experiments.test_programs import ROOT
from tests.report.test_run_page import Reader

SWEEP = f"""from moe_lab.config.load import load
from moe_lab.config.sweep import Sweep, axis, load_sweep, product, zipped

def get_sweep(arg="8"):
  sweep = load_sweep("{ROOT}/configs/sweeps/quickstart.py:tiny")
  base = sweep.base
  if arg.startswith("long"):
    base.train.steps = 400
    base.train.checkpoint_every = 20
    base.train.eval_every = 200
    return Sweep(base, sweep.runs[:int(arg[4:] or 8)])
  if arg == "field":
    arms = {{f"a{{n}}": {{"train.stepz" if n == 7 else "train.steps": n}} for n in range(1, 9)}}
    return Sweep(base, axis("arm", arms))
  if arg == "value":
    return Sweep(base, axis("arm", {{f"a{{n}}": {{"train.steps": 0 if n == 7 else n}} for n in range(1, 9)}}))
  if arg == "failing":
    lost = axis("corpus", {{"here": {{}}, "gone": {{"data.sources": ("text:/nowhere",)}}}})
    return Sweep(base, product(lost, axis("seed", {{"0": {{}}}})))
  return Sweep(base, sweep.runs[:int(arg)])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sweeps")
  (folder / "s.py").write_text(SWEEP)
  return folder


def sweep_of(folder, *arguments):
  environment = {
    "PATH": "/usr/bin:/bin",
    "HOME": str(folder),
    "PYTHONPATH": str(ROOT),
    "MOE_LAB_CACHE": f"{folder}/cache",
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.sweep", *arguments],
    cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def result_of(process, timeout=900):
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1]), err


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--sweep=s.py:field"], ["entry 7 of 8, a7", "config.train.stepz = 7", "did you mean 'train.steps'"]),
    (["--sweep=s.py:value"], ["entry 7 of 8, a7", "config.train.steps = 0"]),
    (["--sweep=s.py:0"], ["--sweep=s.py:0", "at least one run"]),
    (["--sweep=t.py"], ["--sweep=t.py", "did you mean 's.py'"]),
    ([], ["--sweep: wanted"]),
    (["--sweep=s.py", "--launcher=rai"], ["--launcher=rai", "did you mean 'ray'"]),
    (["--sweep=s.py", "--gpus_per_run=1"], ["--gpus_per_run=1: wanted with --launcher=ray or slurm only, not local"]),
    (["--sweep=s.py", "--launcher=jobset", "--image=i", "--claim=c"], ["--topology: wanted with --launcher=jobset"]),
    (["--sweep=s.py", "--launcher=slurm"], ["there is no srun here"]),
  ],
)
def test_a_mistake_is_one_line_before_anything_starts(place, arguments, words):
  if "--launcher=slurm" in arguments:
    pytest.importorskip("submitit")
  out, err = (process := sweep_of(place, "--workdir=w", *arguments)).communicate(timeout=120)
  (line,) = err.splitlines()
  assert process.returncode == 2 and out == "" and all(word in line for word in words), line
  assert not list(place.glob("w/*/config.json"))


def test_a_ray_address_that_does_not_answer(place):
  pytest.importorskip("ray")
  began = time.monotonic()
  arguments = ("--workdir=w", "--sweep=s.py", "--launcher=ray", "--ray_address=127.0.0.1:9")
  out, err = (process := sweep_of(place, *arguments)).communicate(timeout=120)
  (line,) = err.splitlines()
  assert process.returncode == 2 and out == "" and "--ray_address=127.0.0.1:9: no Ray cluster answers there" in line
  assert time.monotonic() - began < 60 and not list(place.glob("w/*/config.json"))


def test_a_dry_run_tells_the_runs_and_starts_none(place):
  told, err = result_of(sweep_of(place, "--sweep=s.py", "--workdir=dry", "--dry_run"))
  assert len(told["runs"]) == 8 and told["finished"] == []
  assert "dim16-rate0.003-topk-1: model.dim=16 train.learning_rate=0.003 routing.method=topk" in err
  assert not (place / "dry").exists()


def test_the_committed_sweep():
  for arg in ("", ":tiny"):
    sweep = load_sweep(f"{ROOT}/configs/sweeps/quickstart.py{arg}")
    configs = sweep.configs()
    assert len(configs) == 8 and len(set(configs.values())) == 8


def test_jobset_renders_a_file_a_run(place):
  arguments = ("--launcher=jobset", "--topology=v5e:4x4", "--image=moe", "--claim=runs")
  result, err = result_of(sweep_of(place, "--sweep=s.py:2", "--workdir=pods", *arguments))
  assert result["runs"] == 2 and all((place / path).is_file() for path in result["files"])
  assert "kubectl apply -f pods/jobset" in err and (place / "pods/sweep.json").is_file()


def test_a_run_that_breaks_is_told_and_no_exception(tmp_path, monkeypatch):
  from moe_lab.train import loop

  def broken(*_):
    raise MemoryError("no room\nfor 8 GB")

  monkeypatch.setattr(loop, "train", broken)
  job = sweep_run.Job(tmp_path / "a", load_sweep(f"{ROOT}/configs/sweeps/quickstart.py:tiny").configs(), [])
  assert sweep_run.perform(job, None) == {"failed": "MemoryError: no room for 8 GB"}


@pytest.mark.slow  # trains two runs
def test_a_sweep_that_was_cut_off_goes_on(place):
  arguments = ("--sweep=s.py:long2", "--workdir=cut")
  process = sweep_of(place, *arguments)
  while not list(place.glob("cut/*/checkpoints/*/*")):
    assert process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=300) == 75
  process.communicate()
  assert not (place / "cut/lock").exists() and not list(place.glob("cut/*/evaluation.json"))

  first, _ = result_of(sweep_of(place, *arguments))
  launches = {run: json.loads((place / "cut" / run / "run.json").read_text())["launches"] for run in first["val_loss"]}
  assert [len(found) for found in launches.values()] == [2, 1] and first["runs"] == 2
  assert next(iter(launches.values()))[1]["step"] > 0
  Reader((place / "cut/sweep.html").read_text())

  # Again: nothing is trained, and the result is the same.
  before = {path: os.stat(path).st_mtime_ns for path in place.glob("cut/*/*.json*")}
  again, _ = result_of(sweep_of(place, *arguments))
  assert again == first and {path: os.stat(path).st_mtime_ns for path in before} == before

  # Another sweep in the same place is refused before it starts.
  out, err = (process := sweep_of(place, "--sweep=s.py:2", "--workdir=cut")).communicate(timeout=120)
  assert process.returncode == 2 and "config.train.steps = 16, but the run in cut/" in err


@pytest.mark.slow  # trains a run
def test_a_run_that_fails_does_not_stop_the_others(place):
  process = sweep_of(place, "--sweep=s.py:failing", "--workdir=failing", "--workers=2")
  out, err = process.communicate(timeout=600)
  assert process.returncode == 1 and out == ""
  assert "error: 1 of 2 runs failed: gone-0: " in err.splitlines()[-1]
  assert "/nowhere" in err.splitlines()[-1] and "failing/gone-0.log" in err.splitlines()[-1]
  assert (place / "failing/here-0/evaluation.json").is_file()
  assert "/nowhere" in (place / "failing/sweep.html").read_text()


@pytest.fixture(scope="module")
def local(place):
  """The losses of eight runs in processes of this machine."""
  result, _ = result_of(sweep_of(place, "--sweep=s.py:long", "--workdir=local", "--workers=2"))
  assert result["runs"] == len(result["val_loss"]) == 8
  return result["val_loss"]


@pytest.mark.slow  # trains eight runs, twice
def test_submitit_gives_the_same_losses(place, local):
  pytest.importorskip("submitit")
  arguments = ("--launcher=slurm", "--cluster=local")
  result, _ = result_of(sweep_of(place, "--sweep=s.py:long", "--workdir=slurm", *arguments))
  assert result["val_loss"] == local


@pytest.mark.slow  # trains eight runs, twice
def test_a_ray_cluster_that_loses_a_node_gives_the_same_losses(place, local):
  pytest.importorskip("ray")
  from ray.cluster_utils import Cluster

  store = {"object_store_memory": 80 * 2**20}
  head = {"num_cpus": 0, "include_dashboard": False, **store}
  cluster = Cluster(initialize_head=True, head_node_args=head)
  try:
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(3)]
    arguments = ("--launcher=ray", f"--ray_address={cluster.address}")
    process = sweep_of(place, "--sweep=s.py:long", "--workdir=ray", *arguments)
    # When all three have saved something, one of them dies.
    while sum(_cut_short(folder) for folder in place.glob("ray/*/")) < 3:
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    cluster.remove_node(nodes[1], allow_graceful=False)
    result, err = result_of(process)
  finally:
    cluster.shutdown()
  assert result["runs"] == len(result["val_loss"]) == 8
  assert result["val_loss"] == local
  launches = [json.loads(path.read_text())["launches"] for path in place.glob("ray/*/run.json")]
  (retried,) = [found for found in launches if len(found) > 1]
  assert len(launches) == 8 and len(retried) == 2 and retried[1]["step"] > 0
  for path in place.glob("ray/*/metrics.jsonl"):
    steps = [record["step"] for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 400
  assert len(json.loads((place / "ray/sweep.json").read_text())["runs"]) == 8


def _cut_short(folder) -> bool:
  """Returns whether a run that is not finished has a checkpoint."""
  return bool(list(folder.glob("checkpoints/*/*"))) and not (folder / "evaluation.json").is_file()


@pytest.mark.slow  # trains a run
def test_ray_runs_save_themselves_when_the_sweep_is_stopped(place):
  pytest.importorskip("ray")
  from ray.cluster_utils import Cluster

  head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
  cluster = Cluster(initialize_head=True, head_node_args=head)
  try:
    arguments = ("--sweep=s.py:long1", "--workdir=stopped", "--launcher=ray", f"--ray_address={cluster.address}")
    process = sweep_of(place, *arguments)
    while not list(place.glob("stopped/*/checkpoints/*/*")):
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    (log,) = place.glob("stopped/*.log")
    assert "the same command goes on from here" in log.read_text()
    assert not list(place.glob("stopped/*/lock")) and not list(place.glob("stopped/*/evaluation.json"))
    assert result_of(sweep_of(place, *arguments))[0]["runs"] == 1
  finally:
    cluster.shutdown()
