"""JobSets: the file against a golden one, the shapes of slices, and a command that makes the same configuration."""

import os
from pathlib import Path

import pytest
import yaml
from absl import flags

from moe_lab.config import Config, MeshConfig, TrainConfig, command_line, from_dict
from moe_lab.config.sweep import load_sweep
from moe_lab.errors import UserError
from moe_lab.launch import jobset
from moe_lab.train.loop import PREEMPTED

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/jobset.yaml"
WORKDIR = Path("/runs/widths")


def rendered(topology, config=None):
  pod = jobset.Pod(topology, "registry.example/moe_lab:1", "runs", 3)
  return jobset.jobset("widths-a", WORKDIR, "a", config or Config(), pod)


def job_of(document):
  (part,) = document["spec"]["replicatedJobs"]
  return part["replicas"], part["template"]["spec"]


def test_against_the_golden_file(tmp_path):
  config = Config(mesh=MeshConfig(fsdp=16, slices=2), train=TrainConfig(steps=50))
  pod = jobset.Pod("v5p:2x4x4", "registry.example/moe_lab:1", "runs", 3)
  (path,) = jobset.write_jobsets(tmp_path / "widths", {"dim64-seed_0": config}, pod)
  text = path.read_text().replace(str(tmp_path), "/runs")
  if os.environ.get("WRITE_GOLDEN"):
    GOLDEN.write_text(text)
  assert text == GOLDEN.read_text()
  replicas, job = job_of(yaml.safe_load(text))
  assert replicas == 2 and job["parallelism"] == job["completions"] == 8  # 32 chips a slice, 4 a host
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [PREEMPTED]


@pytest.mark.parametrize(
  ("topology", "accelerator", "hosts", "chips"),
  [
    ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
    ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
    ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
    ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
    ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
    ("v6e:16x16", "tpu-v6e-slice", 64, 4),
  ],
)
def test_hosts_and_chips_of_a_slice(topology, accelerator, hosts, chips):
  replicas, job = job_of(rendered(topology))
  pod = job["template"]["spec"]
  assert replicas == 1 and job["completions"] == hosts
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]


def test_the_command_makes_the_same_configuration():
  odd = {"data": {"sources": ("text:/a b", "jsonl:/c'd"), "weights": (0.5, 1.0)}, "routing": {"budget_range": (1, 3)}}
  configs = [*load_sweep(f"{ROOT}/configs/sweeps/quickstart.py:tiny").configs().values(), from_dict(odd)]
  for config in configs:
    _, job = job_of(rendered("v5e:1x1", config))
    python, module, program, *arguments = job["template"]["spec"]["containers"][0]["command"]
    assert (python, module, program) == ("python", "-m", "experiments.train")
    arguments = [argument.replace("configs/", f"{ROOT}/configs/") for argument in arguments]
    own = flags.FlagValues()
    command_line.define(own, {"config", "workdir"})
    parsed = command_line.parse(["train", *arguments], own, {"config", "workdir"})
    assert parsed == {"config": config, "workdir": WORKDIR / "a"}


@pytest.mark.parametrize(
  ("topology", "words"),
  [
    ("v5q:4x4", "--topology=v5q:4x4: .*did you mean 'v5"),
    ("v5e:4x4x4", "--topology=v5e:4x4x4: .*2 numbers for v5e"),
    ("v5p:4x4x0", "--topology=v5p:4x4x0: "),
    ("v5p", "--topology=v5p: "),
    ("v5e:3x5", "hosts of 4 chips, and this has 15"),
  ],
)
def test_a_topology_that_is_none(topology, words):
  with pytest.raises(UserError, match=words):
    rendered(topology)


def test_what_does_not_fit_is_told(tmp_path):
  with pytest.raises(UserError, match="config.mesh = .*a divisor of the number of devices, 16"):
    rendered("v5e:4x4", Config(mesh=MeshConfig(fsdp=32)))
  pod = jobset.Pod("v5e:4x4", "i", "c", 3)
  with pytest.raises(UserError, match="'a.b' and 'a_b' would both be the JobSet"):
    jobset.write_jobsets(tmp_path / "w", {"a.b": Config(), "a_b": Config()}, pod)
  with pytest.raises(UserError, match="characters: wanted 40"):
    jobset.write_jobsets(tmp_path / "w", {"a" * 50: Config()}, pod)
  assert not (tmp_path / "w").exists()
