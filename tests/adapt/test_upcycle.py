"""A mixture of experts out of a dense model: the same function, every tensor counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.adapt.upcycle import upcycled
from moe_lab.config.modes import adapted, begun
from moe_lab.config.resolve import resolve
from moe_lab.config.schema import RoutingConfig
from moe_lab.errors import UserError
from moe_lab.nn.transformer import Transformer
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state, state_of
from tests.adapt.models import CONFIG, batches

DENSE = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(CONFIG.model, num_dense_layers=3, num_shared_experts=0),
  routing=RoutingConfig(method="topk", k=1),
)


def made(num_experts, expert_dim, k, dtype="float32"):
  """Returns the new configuration and its state, and the dense model's state."""
  base = dataclasses.replace(DENSE, model=dataclasses.replace(DENSE.model, dtype=dtype))
  config = begun("upcycle", base, "run")
  config.model.num_experts, config.model.expert_dim, config.routing.k = num_experts, expert_dim, k
  config = adapted("upcycle", base, resolve(config), "run")
  optimizer = make_optimizer(config.train)
  dense = initial_state(base, optimizer)
  params, report = upcycled(dense.params, config, jax.random.key(3))
  return base, dense, config, state_of(config, params, optimizer), report


def logits(config, state):
  (batch,) = batches(1)
  budget_B = jnp.full(8, config.routing.mean_count)
  inputs = batch.tokens[:, :-1], batch.segments[:, :-1], budget_B, state.router_state
  out = jax.jit(Transformer(config).apply)({"params": state.params}, *inputs)
  return out.logits_BLV, out.stats


@pytest.mark.parametrize(
  ("num_experts", "expert_dim", "k", "copies", "pieces"),
  [pytest.param(8, 48, 2, 8, 1, marks=pytest.mark.slow), (16, 12, 8, 4, 4), (3, 16, 3, 1, 3)],
)
def test_the_same_function(num_experts, expert_dim, k, copies, pieces):
  base, dense, config, state, report = made(num_experts, expert_dim, k)
  assert report == {"tensors": {"experts": 9}, "copies": copies, "pieces": pieces}
  shapes = jax.eval_shape(lambda: initial_state(config, make_optimizer(config.train))).params
  assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, shapes)
  (want, _), (got, stats) = logits(base, dense), logits(config, state)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert (stats.count_T == k).all()
  if copies > k // pieces:
    assert len(np.unique(np.asarray(stats.assigned_E))) > 1  # the router does choose


@pytest.mark.slow
def test_in_bfloat16():
  base, dense, config, state, _ = made(16, 12, 8, dtype="bfloat16")
  want = logits(base, dense)[0]
  np.testing.assert_allclose(logits(config, state)[0], want, atol=0.03 * np.abs(want).max())


def test_pieces_of_a_copy_get_the_gradient_of_the_mlp():
  # One copy: what its pieces learn, over their factor, is what the MLP would.
  base, dense, config, state, _ = made(3, 16, 3)
  (batch,) = batches(1)

  def gradient(config, state):
    def loss(params):
      inputs = batch.tokens[:, :-1], batch.segments[:, :-1], jnp.full(8, config.routing.mean_count), state.router_state
      return jnp.square(Transformer(config).apply({"params": params}, *inputs).logits_BLV).mean()

    return jax.jit(jax.grad(loss))(state.params)

  want = gradient(base, dense)["dense_layers"]["mlp"]["down_FD"]
  got = gradient(config, state)["moe_layers"]["moe"]["down_EFD"]
  np.testing.assert_allclose(3 * got.reshape(want.shape), want, atol=1e-5 * np.abs(want).max())


def test_what_is_left_over_is_a_line():
  _, dense, config, *_ = made(8, 48, 2)
  dense.params["dense_layers"]["mlp"]["bias_F"] = jnp.zeros((3, 48))
  with pytest.raises(UserError, match="dense_layers/mlp/bias_F was left over: wanted only gate_DF, up_DF, down_FD"):
    upcycled(dense.params, config, jax.random.key(0))
  del dense.params["dense_layers"]["mlp"]["bias_F"], dense.params["dense_layers"]["mlp"]["up_DF"]
  with pytest.raises(UserError, match="6 tensors of experts were transformed: wanted 9"):
    upcycled(dense.params, config, jax.random.key(0))


@pytest.mark.parametrize(
  ("num_experts", "expert_dim", "k", "words"),
  [
    (8, 20, 2, "model.expert_dim = 20: wanted a divisor of model.dense_dim = 48"),
    (9, 24, 2, "model.num_experts = 9: wanted a multiple of 2, the pieces"),
    (8, 24, 3, "routing.k = 3: wanted a multiple of 2"),
  ],
)
def test_sizes_that_do_not_go_are_a_line(num_experts, expert_dim, k, words):
  with pytest.raises(UserError, match=words):
    made(num_experts, expert_dim, k)
