"""A small model with a dense layer and shared experts, trained for some steps on a text of few letters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

CONFIG = Config(
  model=ModelConfig(
    dim=32,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=4,
    expert_dim=24,  # a group of 16 and a half
    dense_dim=48,
    num_shared_experts=1,
  ),
  routing=RoutingConfig(k_max=4, warmup_steps=0, budget=2.0),
  data=DataConfig(vocab_size=32, seq_len=16),
  train=TrainConfig(steps=40, batch_size=8, warmup_steps=4, learning_rate=1e-2),
)


def adapted(config=CONFIG, **fields):
  return dataclasses.replace(config, adapt=AdaptConfig(**fields))


def batches(num=4, rows=8, seed=0):
  """Rows of 17 tokens that count up from a random start by a random step: predictable from the third token on."""
  rng = np.random.default_rng(seed)
  for _ in range(num):
    start, step = rng.integers(0, 32, (rows, 1)), rng.integers(1, 4, (rows, 1))
    tokens = ((start + step * np.arange(17)) % 32).astype(np.int32)
    yield Batch(tokens, np.ones_like(tokens), np.zeros_like(tokens))


def run_steps(config, state, num, seed=0, reference=None):
  """Returns the state after some steps, and each step's metrics."""
  step = make_train_step(config, Transformer(config), make_optimizer(config.train))
  state, seen = jax.tree.map(jnp.copy, state), []
  for batch in batches(num, seed=seed):
    state, metrics = step(state, batch, reference)
    seen.append(metrics)
  return state, seen


@functools.cache
def begun():
  """Returns the state before training."""
  return jax.jit(lambda: initial_state(CONFIG, make_optimizer(CONFIG.train)))()


@functools.cache
def trained():
  """Returns the state after training."""
  return run_steps(CONFIG, begun(), CONFIG.train.steps)[0]


@functools.cache
def _apply(config, traced):
  model = Transformer(config, traced=traced)
  return jax.jit(lambda *inputs: model.apply(*inputs))


def outputs(params, state, config=CONFIG, traced=False):
  """Returns the model's output on a batch."""
  (batch,) = batches(1, seed=9)
  inputs = (batch.tokens[:, :-1], batch.segments[:, :-1], jnp.full(8, config.routing.budget))
  return _apply(dataclasses.replace(config, adapt=AdaptConfig()), traced)(
    {"params": params}, *inputs, state.router_state
  )
