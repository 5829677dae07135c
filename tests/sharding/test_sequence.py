"""Attention on several devices computes what one does; run in a process of its own, which has four CPU devices."""

import pytest

from tests.sharding import four_devices

_CHECKS = """
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.ops.attention import attention
from moe_lab.ops.alibi import windows
from moe_lab.routing.registry import make_router
from moe_lab.sharding.sequence import spread_attention, tokens_spec

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
by_sequence, by_stretch = P(("data", "expert")), P(None, ("data", "expert"))
assert tokens_spec(mesh, 8, 6) == by_sequence  # two sequences a device
assert tokens_spec(mesh, 1, 8) == tokens_spec(mesh, 6, 8) == by_stretch
assert tokens_spec(mesh, 1, 6) == tokens_spec(None, 4, 4) == P()

slopes = np.float32([0.5, 0.16, 0.0])
window_M = windows(slopes, 2.0)
for batch, length, spec in ((4, 40, by_sequence), (1, 144, by_stretch), (2, 50, P())):
  rng = np.random.default_rng(0)
  q, k, v, d_out = (rng.normal(size=(batch, length, n, 8)).astype(np.float32) for n in (6, 3, 3, 6))
  q, k = (x * (2 * 8**0.5) ** 0.5 / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  segments = np.sort(rng.integers(1, 3, (batch, length)), axis=1).astype(np.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def both(run, q, k, v, d_out):
    out, backward = jax.vjp(run, q, k, v)
    return out, *backward(d_out)

  def one_device(q, k, v):
    return attention(q, k, v, slopes, segments, segments, backend="reference")

  def four_devices(q, k, v):
    return spread_attention(q, k, v, slopes, segments, mesh, window_M=window_M, backend="blocked", block=16)

  got, want = both(four_devices, q, k, v, d_out), both(one_device, q, k, v, d_out)
  assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), got[0].sharding
  for one, wanted in zip(got, want):
    np.testing.assert_allclose(one, wanted, atol=5e-6, err_msg=str(spec))

# One sequence, its tokens and the experts spread over the same four devices.
config = Config(
  model=ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=4, expert_dim=8),
  routing=RoutingConfig(method="topk", k=2),
  data=DataConfig(vocab_size=32, seq_len=12),
)
tokens = rng.integers(0, 32, (1, 12)).astype(np.int32)
state = make_router(config.routing).initial_state(2, 4)
inputs = tokens, np.ones_like(tokens), np.ones(1, np.float32), state
params = jax.jit(Transformer(config).init)(jax.random.key(0), *inputs)
one, four = (jax.jit(Transformer(config, where).apply)(params, *inputs).logits_BLV for where in (None, mesh))
np.testing.assert_allclose(four, one, atol=1e-5)
print("all equal")
"""


@pytest.mark.slow
def test_attention_on_four_devices_is_that_of_one():
  four_devices.run(_CHECKS)
