"""The presets have the published sizes, and each of them trains, made small."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import baselines, large_200b, medium_50b
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.resolve import resolve
from moe_lab.nn.transformer import Transformer
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import abstract_state, initial_state, parameter_counts
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

PRESETS = {
  "medium_50b": medium_50b.get_config("8k"),
  "large_200b": large_200b.get_config(),
  **{name: baselines.get_config(name) for name in baselines.SHAPES},
}


@pytest.mark.parametrize(
  "name, total, active",
  [
    ("medium_50b", 50.2e9, 14.0e9),
    ("large_200b", 208e9, 31e9),
    ("llama3_70b", 70.6e9, 70.6e9),
    ("phi3_medium", 14.0e9, 14.0e9),
    ("mixtral_8x7b", 46.7e9, 12.9e9),
    ("deepseek_moe_16b", 16.4e9, 2.8e9),
  ],
)
def test_parameters_are_as_many_as_published(name, total, active):
  config = resolve(PRESETS[name])
  got_total, got_active = parameter_counts(abstract_state(config).params, config, config.routing.slots)
  assert got_total == pytest.approx(total, rel=0.01) and got_active == pytest.approx(active, rel=0.02)


def shrunken(config):
  """The same system with everything that is large made small; ratios of heads, and of experts to slots, as they are."""
  model = config.model
  groups = model.num_heads // model.num_kv_heads
  experts, slots = min(model.num_experts, 8), min(config.routing.slots, 4)
  small = dataclasses.replace(
    model, dim=32, num_layers=model.num_dense_layers + 2, num_heads=2 * groups, num_kv_heads=2, head_dim=8,
    num_experts=experts, expert_dim=16, dense_dim=32,
  )  # fmt: skip
  counts = dict(k=slots) if config.routing.fixed else dict(k_max=slots)
  routing = dataclasses.replace(config.routing, **counts, warmup_steps=1)
  return dataclasses.replace(
    config,
    model=small,
    routing=routing,
    data=dataclasses.replace(config.data, vocab_size=64, seq_len=16),
    train=dataclasses.replace(config.train, batch_size=4, accumulate=1, warmup_steps=1, steps=4, learning_rate=1e-2),
    mesh=MeshConfig(),
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_each_trains_a_few_steps_made_small(name):
  config = shrunken(resolve(PRESETS[name]))
  optimizer = make_optimizer(config.train)
  state, step = initial_state(config, optimizer), make_train_step(config, Transformer(config), optimizer)
  tokens = np.tile(np.arange(17, dtype=np.int32), (4, 1))
  losses = []
  for _ in range(4):
    state, metrics = step(state, Batch(tokens, np.ones_like(tokens), np.zeros_like(tokens)))
    losses.append(float(metrics.loss_sum / metrics.loss_weight))
  assert np.isfinite(losses).all() and losses[-1] < losses[0] < 2 * math.log(64)
  assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), state.params))
