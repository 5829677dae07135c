"""Small runs as processes that things happen to."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from moe_lab.config.schema import Config
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.run import load_run
from moe_lab.io.writers import read_metrics
from moe_lab.train.state import abstract_state

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
  f"--config={ROOT}/configs/quickstart.py",
  "--config.model.dim=16",
  "--config.model.num_layers=2",
  "--config.model.num_experts=4",
  "--config.model.expert_dim=8",
  "--config.model.head_dim=8",
  "--config.routing.k_max=4",
  "--config.routing.warmup_steps=20",
  "--config.data.sources=synthetic:difficulty",
  "--config.data.vocab_size=27",
  "--config.data.seq_len=32",
  "--config.train.batch_size=8",
  "--config.train.log_every=10",
  "--config.train.eval_every=200",
  "--config.train.eval_batches=1",
  "--config.train.checkpoint_every=25",
]


class Launch:
  """`experiments.train` as a process; what it says is gathered as it comes."""

  def __init__(self, workdir: Path, *arguments: str, **environment: str):
    command = [sys.executable, "-m", "experiments.train", *ARGUMENTS, f"--workdir={workdir}", *arguments]
    # Beside the runs, so that only the first one compiles.
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "MOE_LAB_CACHE": str(workdir.parent / "cache")}
    self.process = subprocess.Popen(
      command, env=os.environ | fixed | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    self.said: list[str] = []
    self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
    self._reader.start()

  @property
  def stderr(self) -> str:
    """What it has said so far; all of it once it has ended."""
    if self.process.poll() is not None:
      self._reader.join(10)
    return "".join(self.said)

  def wait_for(self, happened, seconds: float = 300) -> bool:
    """Waits until `happened()`, or its end; returns whether it happened."""
    deadline = time.monotonic() + seconds
    while not happened():
      if self.process.poll() is not None:
        return False
      assert time.monotonic() < deadline, self.stderr
      time.sleep(0.005)
    return True

  def go_on(self, seconds: float) -> None:
    """Lets it run for some time, or to its end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(seconds)

  def end(self, seconds: float = 300) -> int:
    """Waits for its end; returns its exit code."""
    try:
      return self.process.wait(seconds)
    finally:
      self.process.kill()


def calm_run(workdir: Path, *arguments: str) -> Path:
  """Trains a run that nothing happens to, and returns its directory."""
  launch = Launch(workdir, *arguments)
  assert launch.end() == 0, launch.stderr
  return workdir


def config_of(workdir: Path) -> Config:
  return load_run(workdir)[0]


def final(workdir: Path) -> tuple[object, dict, int]:
  """Returns the newest checkpoint of a run."""
  with Checkpointer(workdir, keep=None) as checkpointer:
    return checkpointer.restore(abstract_state(config_of(workdir)))


def assert_same_end(workdir: Path, calm: Path) -> None:
  """Two runs ended alike, bit for bit: state, position in the data, and every record but for the clock."""
  (state, meta, step), (wanted, wanted_meta, wanted_step) = final(workdir), final(calm)
  assert step == wanted_step and meta["loader"] == wanted_meta["loader"]
  assert jax.tree.structure(state) == jax.tree.structure(wanted)
  for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
  evals, others = ([r for r in read_metrics(folder) if r["kind"] == "eval"] for folder in (workdir, calm))
  assert [(r["step"], r["val_loss"]) for r in evals] == [(r["step"], r["val_loss"]) for r in others]
