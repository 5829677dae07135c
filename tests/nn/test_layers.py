"""The layers by themselves: shared experts, and the bound of QK-norm in place."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.nn.attention import Attention, layer_slopes, layer_windows, sharpened
from moe_lab.nn.moe import MoE
from moe_lab.ops.grouped_mlp import swiglu
from moe_lab.routing.base import Decisions, RouterContext, RouterState


def random_like(shapes, scale=0.4):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def test_every_token_takes_every_shared_expert():
  # Two shared experts are one MLP of twice the width: the sum of its halves, added to what the routed experts give.
  tokens, model = 11, ModelConfig(dim=8, num_experts=4, expert_dim=6, num_shared_experts=2)
  context = RouterContext(
    mask_T=jnp.arange(tokens) < 9,
    budget_T=jnp.full(tokens, 2.0),
    embedding_TD=jnp.zeros((tokens, 8)),
    state=RouterState(jnp.zeros(4), jnp.ones(4), jnp.zeros(()), {}),
    key=None,
    decisions=Decisions(),
  )
  x_TD = jax.random.normal(jax.random.key(0), (tokens, 8))
  moe = MoE(model, RoutingConfig(method="topk", k=2), 1.0)
  params = random_like(jax.eval_shape(moe.init, jax.random.key(0), x_TD, context))["params"]
  apply = jax.jit(lambda params: moe.apply({"params": params}, x_TD, context))
  shared = params["shared"]
  want = sum(
    swiglu(x_TD, shared["gate_DF"][:, half], shared["up_DF"][:, half], shared["down_FD"][half])
    for half in (slice(0, 6), slice(6, 12))
  )
  y_TD, stats = apply(params)
  only_shared, _ = apply(params | {"down_EFD": jnp.zeros_like(params["down_EFD"])})
  only_routed, _ = apply(params | {"shared": jax.tree.map(jnp.zeros_like, shared)})
  np.testing.assert_allclose(only_shared, want, atol=1e-5)
  np.testing.assert_allclose(y_TD, only_shared + only_routed, atol=1e-5)
  assert not only_routed[9:].any() and only_routed[:9].any(axis=1).all()  # padding takes no routed expert
  assert stats.assigned_E.sum() == 18  # shared experts are no rows of the router's

  # The same width by another field, and a gate over it: half, where it is zero.
  gated = dataclasses.replace(model, num_shared_experts=0, shared_dim=12, shared_gate=True)
  halved, _ = MoE(gated, RoutingConfig(method="topk", k=2), 1.0).apply(
    {"params": params | {"shared_gate_D": jnp.zeros(8)}}, x_TD, context
  )
  np.testing.assert_allclose(halved, only_routed + only_shared / 2, atol=1e-5)


def test_interpolation_stretches_slopes_and_windows():
  config = ModelConfig(num_heads=4, num_kv_heads=4, qk_bound=8.0)
  stretched = dataclasses.replace(config, position_interpolation=4.0)
  np.testing.assert_allclose(layer_slopes(stretched), layer_slopes(config) / 4, rtol=1e-6)
  # Slopes 2^-(4/3), 2^-4 and 2^-(20/3) over 4; (16 + 16.118 - ln(1 - e^-m)) / m.
  for window, slope in zip(layer_windows(stretched), [2 ** -(4 / 3) / 4, 2**-6, 2 ** -(20 / 3) / 4], strict=False):
    assert window == math.ceil((16 + 16.118 - math.log(1 - math.exp(-slope))) / slope)
  assert layer_windows(stretched)[-1] is None


def test_interpolated_rotary_tokens_stand_closer():
  # Two tokens at twice the distance, under an interpolation of two, are the two at the distance itself.
  base = ModelConfig(dim=8, num_heads=2, num_kv_heads=1, head_dim=4, position="rotary", num_global_groups=0)
  stretched = dataclasses.replace(base, position_interpolation=2.0)
  x_BLD = jax.random.normal(jax.random.key(0), (1, 5, 8))
  layer, segment_BL = Attention(base, 1.0), jnp.ones((1, 5), jnp.int32)
  params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x_BLD, segment_BL, 0, None))["params"]

  def last(config, tokens):
    segment = jnp.zeros((1, 5), jnp.int32).at[:, jnp.asarray(tokens)].set(1)
    return Attention(config, 1.0).apply({"params": params}, x, segment, 0, None)[0][0, tokens[-1]]

  x = x_BLD.at[:, 4].set(x_BLD[:, 2])
  np.testing.assert_allclose(last(stretched, [0, 4]), last(base, [0, 2]), atol=1e-5)
  assert np.abs(last(base, [0, 4]) - last(base, [0, 2])).max() > 1e-3


def test_groups_without_a_slope_are_sharpened_beyond_the_trained_length():
  q_BLNH = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
  position_BL = jnp.asarray([[0, 3, 7, 8, 63], [1, 2, 4, 6, 511]])
  times_BL = np.asarray([[1, 1, 1, math.log(9) / math.log(8), 2], [1, 1, 1, 1, 3]])
  want = np.asarray(q_BLNH).copy()
  want[:, :, 2:] *= times_BL[:, :, None, None]  # the second group's two heads
  np.testing.assert_allclose(sharpened(q_BLNH, position_BL, jnp.asarray([0.5, 0.0]), 8), want, rtol=1e-6)
  config = ModelConfig(dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
  x_BLD, segment_BL = jax.random.normal(jax.random.key(0), (1, 12, 8)), jnp.ones((1, 12), jnp.int32)
  layer = Attention(config, 1.0)
  params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x_BLD, segment_BL, 0, None))
  plain, sharp = (
    Attention(dataclasses.replace(config, sharpen_from=start), 1.0).apply(params, x_BLD, segment_BL, 0, None)[0][0]
    for start in (0, 8)
  )
  np.testing.assert_array_equal(plain[:8], sharp[:8])
  assert (np.abs(plain - sharp)[8:].max(1) > 1e-4).all()


@pytest.mark.parametrize("position", ["alibi", "rotary"])
def test_attention_cannot_escape_the_bound(position):
  # With |q.k| / sqrt(H) <= S weights differ by e^(2S) at most, whatever the parameters. At S = 1e-4 and without slopes
  # they are all but equal: each token gets the mean of the values so far. Without the norm one key would take all.
  config = ModelConfig(
    dim=8, num_heads=4, num_kv_heads=2, head_dim=4, num_global_groups=2, qk_bound=1e-4, position=position
  )
  layer, x_BLD = Attention(config, 1.0), jax.random.normal(jax.random.key(0), (2, 9, 8))
  segment_BL = jnp.ones((2, 9), jnp.int32)

  def apply(params):
    return layer.apply({"params": params}, x_BLD, segment_BL, 0, None)[0]

  params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x_BLD, segment_BL, 0, None))["params"]
  huge = params | {name: 1e4 * params[name] for name in ("query_DNH", "key_DMH")}
  huge |= {name: jax.tree.map(lambda gain: 1e4 * gain, params[name]) for name in ("query_norm", "key_norm")}
  value_BLMH = jnp.einsum("BLD,DMH->BLMH", x_BLD, params["value_DMH"])
  mean_BLMH = jnp.cumsum(value_BLMH, axis=1) / jnp.arange(1, 10)[:, None, None]
  want = jnp.einsum("BLNH,NHD->BLD", jnp.repeat(mean_BLMH, 2, axis=2), params["out_NHD"])
  np.testing.assert_allclose(jax.jit(apply)(huge), want, atol=1e-3)
