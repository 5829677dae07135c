"""PPO: the model is frozen after the warm-up, and a rollout serves several updates."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.errors import ConfigError
from moe_lab.nn.transformer import Transformer
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.ppo import EPOCHS, HEADS
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

CONFIG = Config(
  model=ModelConfig(
    dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, expert_dim=8,
    dispatch="dense", attention_backend="reference",
  ),
  routing=RoutingConfig(k_max=4, warmup_steps=2, learner="ppo"),
  data=DataConfig(vocab_size=32, seq_len=12),
  train=TrainConfig(steps=20, batch_size=4, warmup_steps=1, learning_rate=1e-2),
)  # fmt: skip


@pytest.mark.slow
def test_after_the_warm_up_only_the_heads_move():
  optimizer = make_optimizer(CONFIG.train)
  state = jax.jit(initial_state, static_argnums=(0, 1))(CONFIG, optimizer)
  step = make_train_step(CONFIG, Transformer(CONFIG), optimizer)
  tokens = np.random.default_rng(0).integers(0, 32, (4, 13)).astype(np.int32)
  batch = Batch(tokens, np.ones_like(tokens), np.zeros_like(tokens))
  for index in range(5):
    before = jax.tree.map(np.array, state.params)
    state, metrics = step(state, batch)
    moved = jax.tree_util.tree_map_with_path(
      lambda path, old, new: (path[-1].key, not np.array_equal(old, new)), before, state.params
    )
    moved = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    heads = [change for name, change in moved if name in HEADS]
    model = [change for name, change in moved if name not in HEADS]
    assert len(heads) == 6 and any(heads)
    assert all(model) if index < 2 else not any(model)
    assert np.isfinite(float(metrics.loss_sum)) and metrics.skipped == 0
  # The epochs of a step share its learning rate: the optimizer counts steps, not epochs.
  leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
  counts = {int(leaf) for path, leaf in leaves if getattr(path[-1], "name", "") == "count"}
  assert EPOCHS > 1 and counts == {5}


def test_accumulation_is_refused():
  with pytest.raises(ConfigError, match="train.accumulate.*ppo"):
    dataclasses.replace(CONFIG, train=TrainConfig(batch_size=4, accumulate=2))
