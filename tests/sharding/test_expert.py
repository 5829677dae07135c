"""Experts on several devices compute what one device does; run in a process of its own, which has four CPU devices."""

import pytest

from tests.sharding import four_devices

_CHECKS = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.routing.base import Assignment
from moe_lab.routing.dispatch import dispatch
from moe_lab.sharding.expert import TOKENS, expert_parallel, splits, state_shardings
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

T, K, E, D, F = 24, 3, 8, 6, 5
keys = jax.random.split(jax.random.key(0), 7)
shapes = ((E, D, F), (E, D, F), (E, F, D))
weights = ExpertWeights(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes)))
x_TD, dy_TD = (jax.random.normal(key, (T, D)) for key in keys[3:5])
gate_TK = jax.random.uniform(keys[5], (T, K), minval=0.1)
random_TK = jnp.argsort(jax.random.uniform(keys[6], (T, E)), axis=1)[:, :K].astype(jnp.int32)
all_TK = jnp.ones((T, K), bool)
some_TK = jnp.arange(K) < (jnp.arange(T) % (K + 1))[:, None]
ROUTINGS = {
  "random": (random_TK, all_TK),
  "same experts, on two devices": (jnp.broadcast_to(jnp.array([5, 4, 6], jnp.int32), (T, K)), all_TK),
  "one expert": (jnp.full((T, K), 7, jnp.int32), all_TK),
  "empty experts": (random_TK % 3, all_TK),
  "invalid slots": (random_TK, some_TK),
  "nothing": (random_TK, ~all_TK),
}


def mesh_of(*shape):
  return Mesh(np.array(jax.devices()).reshape(shape), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)


def values_and_gradients(run):
  @jax.jit
  def both(expert_TK, valid_TK):
    def at(x_TD, gate_TK, weights):
      return run(x_TD, Assignment(expert_TK, gate_TK, valid_TK), weights)

    y_TD, backward = jax.vjp(at, x_TD, gate_TK, weights)
    return y_TD, backward(dy_TD)

  return both


dense = values_and_gradients(lambda x, a, w: dispatch(x, a, w, backend="dense")[0])
mesh = mesh_of(2, 2)
spread = values_and_gradients(lambda x, a, w: expert_parallel(x, a, w, mesh))
for name, routing in ROUTINGS.items():
  for got, want in zip(jax.tree.leaves(spread(*routing)), jax.tree.leaves(dense(*routing)), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-4, err_msg=name)

assert splits(mesh_of(1, 4), 8) and not splits(mesh_of(1, 4), 6)
assert not splits(mesh_of(4, 1), 8) and not splits(None, 8)

config = Config(
  model=ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, expert_dim=8),
  routing=RoutingConfig(method="topk", k=2),
  data=DataConfig(vocab_size=32, seq_len=12),
  train=TrainConfig(steps=20, batch_size=8, warmup_steps=4, learning_rate=1e-2),
)
optimizer = make_optimizer(config.train)
tokens = np.random.default_rng(0).integers(0, 32, (8, 13)).astype(np.int32)
batch = Batch(tokens, np.ones_like(tokens), np.zeros_like(tokens))
new, metrics = make_train_step(config, Transformer(config), optimizer)(initial_state(config, optimizer), batch)
mesh = mesh_of(1, 4)
state = initial_state(config, optimizer)
spread_new, spread_metrics = make_train_step(config, Transformer(config, mesh), optimizer)(
  jax.device_put(state, state_shardings(state, mesh)), jax.device_put(batch, NamedSharding(mesh, TOKENS))
)
np.testing.assert_allclose(spread_metrics.loss_sum, metrics.loss_sum, rtol=1e-5)
np.testing.assert_allclose(spread_metrics.grad_norm, metrics.grad_norm, rtol=1e-4)
gate = spread_new.params["moe_layers"]["moe"]["gate_EDF"]
assert gate.sharding.spec[1] == "expert", gate.sharding
print("all equal")
"""


@pytest.mark.slow
def test_experts_on_four_devices_compute_what_one_device_does():
  four_devices.run(_CHECKS)
