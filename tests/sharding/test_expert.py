"""Experts on several devices compute what one device does; run in a process of its own, which has eight CPU devices."""

import pytest

from tests.sharding import eight_devices

_CHECKS = """
import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.mesh import MeshConfig
from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.routing.base import Assignment
from moe_lab.routing.dispatch import dispatch
from moe_lab.sharding.expert import expert_parallel, splits
from moe_lab.sharding.mesh import make_mesh

B, T, K, E, D, F = 8, 48, 3, 8, 6, 4
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
  "same experts, on few devices": (jnp.broadcast_to(jnp.array([5, 4, 6], jnp.int32), (T, K)), all_TK),
  "one expert": (jnp.full((T, K), 7, jnp.int32), all_TK),
  "empty experts": (random_TK % 3, all_TK),
  "invalid slots": (random_TK, some_TK),
  "nothing": (random_TK, ~all_TK),
}


def values_and_gradients(run):
  @jax.jit
  def both(expert_TK, valid_TK):
    def at(x_TD, gate_TK, weights):
      return run(x_TD, Assignment(expert_TK, gate_TK, valid_TK), weights)

    y_TD, backward = jax.vjp(at, x_TD, gate_TK, weights)
    return y_TD, backward(dy_TD)

  return both


dense = values_and_gradients(lambda x, a, w: dispatch(x, a, w, backend="dense")[0])
for axes in (dict(data=2, expert=4), dict(fsdp=2, expert=2, model=2), dict(expert=4, sequence=2), dict(expert=8)):
  mesh = make_mesh(MeshConfig(**axes))
  spread = values_and_gradients(lambda x, a, w: expert_parallel(x, a, w, mesh, batch=B))
  for name, routing in ROUTINGS.items():
    for got, want in zip(jax.tree.leaves(spread(*routing)), jax.tree.leaves(dense(*routing)), strict=True):
      np.testing.assert_allclose(got, want, atol=2e-4, err_msg=f"{axes} {name}")

assert splits(mesh, 8, 3) and splits(mesh, 1, 16) and not splits(mesh, 3, 3)
assert not splits(None, 8, 8)
print("all equal")
"""


@pytest.mark.slow
def test_experts_on_eight_devices_compute_what_one_device_does():
  eight_devices.run(_CHECKS)
