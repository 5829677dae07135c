"""2N steps are N + N steps after a restart, bit for bit; SIGTERM and bad gradients lose nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.data.loader import open_data
from moe_lab.errors import RunError, UserError
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.writers import read_metrics
from moe_lab.train import loop
from moe_lab.train.loop import train
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step

CONFIG = Config(
  model=ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=4, expert_dim=8),
  routing=RoutingConfig(k_max=4, warmup_steps=3, expert_dropout=0.0, bias_update_rate=0.01),
  data=DataConfig(sources=("synthetic:difficulty",), vocab_size=27, seq_len=16),
  train=TrainConfig(
    steps=8, batch_size=8, warmup_steps=2, log_every=2, eval_every=4, eval_batches=1, checkpoint_every=4
  ),
)


def final_state(workdir):
  abstract = jax.eval_shape(lambda: initial_state(CONFIG, make_optimizer(CONFIG.train)))
  with Checkpointer(workdir, keep=None) as checkpointer:
    return checkpointer.restore(abstract)


def records(workdir):
  """What was logged, without the clock, and without a sum whose rounding depends on where logs were cut."""
  clocked = ("tokens_per_second", "time", "flops")
  return [{k: v for k, v in record.items() if k not in clocked} for record in read_metrics(workdir)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
  """A run of 2N steps without interruption."""
  workdir = tmp_path_factory.mktemp("calm")
  result = train(CONFIG, workdir, workdir / "cache", ["test"])
  return workdir, result


def test_the_result_has_the_contract_keys(calm):
  workdir, result = calm
  assert {
    "steps", "val_loss", "bigram_loss", "budget", "mean_experts", "eval_mean_experts", "tokens_per_second", "workdir",
  } <= result.keys()  # fmt: skip
  assert result["steps"] == 8
  assert (workdir / "evaluation.json").exists()
  run = json.loads((workdir / "run.json").read_text())
  assert run["data"][0]["source"] == "synthetic:difficulty"


# On a checkpoint's step, and between two.
@pytest.mark.parametrize("stop_at", [pytest.param(4, marks=pytest.mark.slow), 5])
def test_a_resumed_run_is_the_same_bit_for_bit(calm, tmp_path, stop_at, monkeypatch):
  places = []  # of the state, at each step: of other places is another program, which a restart would have to compile

  def noting(*parts):
    train_step = make_train_step(*parts)

    def step(state, batch):
      places.append([(leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(state)])
      return train_step(state, batch)

    return step

  monkeypatch.setattr(loop, "make_train_step", noting)
  with pytest.raises(SystemExit) as stopped:
    train(CONFIG, tmp_path, tmp_path / "cache", ["test"], stop_at=stop_at)
  assert stopped.value.code == 75
  result = train(CONFIG, tmp_path, tmp_path / "cache", ["test"])

  (calm_state, calm_meta, calm_step), (state, meta, step) = final_state(calm[0]), final_state(tmp_path)
  assert step == calm_step == 8
  jax.tree.map(np.testing.assert_array_equal, state, calm_state)
  assert meta["loader"] == calm_meta["loader"]
  assert result["val_loss"] == calm[1]["val_loss"]
  assert len(places) == 8 and all(place == places[0] for place in places)
  # A stop between two logs splits one record in two; all later ones must be equal.
  assert records(tmp_path)[-1] == records(calm[0])[-1]


def test_starting_a_finished_run_again_changes_nothing(calm):
  workdir, result = calm
  before = (workdir / "metrics.jsonl").read_text()
  again = train(CONFIG, workdir, workdir / "cache", ["test"])
  assert again["val_loss"] == result["val_loss"] and again["mean_experts"] == result["mean_experts"]
  assert (workdir / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_and_nothing_is_written(calm):
  workdir, _ = calm
  before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, learning_rate=1e-4))
  with pytest.raises(UserError, match="config.train.learning_rate"):
    train(other, workdir, workdir / "cache", ["test"])
  assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("warmup, said", [(8, True), (7, False)])
def test_a_run_that_is_all_warm_up_says_so(tmp_path, monkeypatch, capsys, warmup, said):
  monkeypatch.setattr(loop, "_Training", lambda *parts: SimpleNamespace(run=dict))
  config = dataclasses.replace(CONFIG, routing=dataclasses.replace(CONFIG.routing, warmup_steps=warmup))
  train(config, tmp_path / "run", tmp_path / "cache", ["test"])
  assert ("no policy is learned" in capsys.readouterr().err) == said


@pytest.mark.fault("gradient not finite, or a spike")
def test_gradients_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
  from moe_lab.train import losses

  real = losses.spread_head_loss
  monkeypatch.setattr(losses, "spread_head_loss", lambda *a: jax.tree.map(lambda x: x * jnp.nan, real(*a)))
  config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, max_skipped=2))
  with pytest.raises(RunError, match="not finite.*learning_rate"):
    train(config, tmp_path, tmp_path / "cache", ["test"])
  skipped = [record for record in read_metrics(tmp_path) if record["kind"] == "skipped"]
  assert [record["step"] for record in skipped[:2]] == [1, 2] and skipped[0]["batch"] == "skipped/1.npz"
  loader = open_data(config.data, tmp_path / "cache").train_loader(config.train.batch_size)
  for record in skipped:
    batch = next(loader)
    if record["batch"]:
      with np.load(tmp_path / record["batch"], allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["tokens"], batch.tokens)


PROGRAM = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_resume import CONFIG
from moe_lab.train.loop import train
config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=100_000))
train(config, Path(sys.argv[1]), Path(sys.argv[1]) / "cache", ["test"])
"""


def test_sigterm_saves_and_exits_75(tmp_path):
  program = PROGRAM.format(folder=os.path.dirname(__file__))
  process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 120
  while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == 75, stderr
  with Checkpointer(tmp_path, keep=None) as checkpointer:
    assert checkpointer.latest_step() > 0
  assert "stopped at step" in stderr and "Traceback" not in stderr
