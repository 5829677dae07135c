"""Attention on several devices computes what one does; run in a process of its own, which has eight CPU devices."""

import pytest

from tests.sharding import eight_devices

_CHECKS = """
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_lab.config.mesh import MeshConfig
from moe_lab.ops.attention import attention
from moe_lab.ops.alibi import windows
from moe_lab.sharding.mesh import make_mesh
from moe_lab.sharding.rules import BATCH, token_spec
from moe_lab.sharding.sequence import common_windows, halos, spread_attention

assert common_windows((5, 9, 40, None), 1) == (5, 9, 40, None)
assert common_windows((5, 9, 40, None), 2) == (40, None) and common_windows((7, 5, 6, 8), 2) == (7, 8)

# Stretches of 8: with 9 keys a query needs the 8 before it. Where half of all stretches are wanted, all are gathered.
assert halos((5, 9, 10, 40, None), 8, 16) == [(slice(0, 2), 1), (slice(2, 3), 2), (slice(3, 4), 5), (slice(4, 5), None)]
assert halos((1, 9, 10, 40, None), 8, 8) == [(slice(0, 1), 0), (slice(1, 2), 1), (slice(2, 3), 2), (slice(3, 5), None)]

slopes = np.float32([0.5, 0.3, 0.16, 0.0])
window_M = windows(slopes, 2.0)
by_sequence, by_stretch = P(BATCH, "sequence"), P(None, (*BATCH, "sequence"))
CASES = (
  (dict(data=2, expert=4), 8, 40, by_sequence),
  (dict(data=2, expert=2, sequence=2), 4, 80, by_sequence),
  (dict(data=2, expert=2, model=2), 4, 40, by_sequence),
  (dict(fsdp=2, expert=2, sequence=2), 1, 144, by_stretch),  # too few sequences
  (dict(fsdp=2, expert=2, sequence=2), 2, 144, P(("fsdp",), ("data", "expert", "sequence"))),  # one each for some
  (dict(sequence=8), 1, 320, by_sequence),  # halos of one and two stretches
  (dict(expert=4, model=2), 1, 144, by_stretch),
  (dict(expert=8), 2, 50, P()),
)
for axes, batch, length, spec in CASES:
  mesh = make_mesh(MeshConfig(**axes))
  assert token_spec(mesh, batch, length) == spec
  rng = np.random.default_rng(0)
  q, k, v, d_out = (rng.normal(size=(batch, length, n, 8)).astype(np.float32) for n in (8, 4, 4, 8))
  q, k = (x * (2 * 8**0.5) ** 0.5 / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  segments = np.sort(rng.integers(1, 3, (batch, length)), axis=1).astype(np.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def both(run, q, k, v, d_out):
    out, backward = jax.vjp(run, q, k, v)
    return out, *backward(d_out)

  def one_device(q, k, v):
    return attention(q, k, v, slopes, segments, segments, backend="reference")

  def many_devices(q, k, v):
    return spread_attention(q, k, v, slopes, segments, mesh, window_M=window_M, backend="blocked", block=16)

  got, want = both(many_devices, q, k, v, d_out), both(one_device, q, k, v, d_out)
  heads = NamedSharding(mesh, P(*(spec or (None, None)), "model"))
  assert got[0].sharding.is_equivalent_to(heads, 4), got[0].sharding
  for one, wanted in zip(got, want):
    np.testing.assert_allclose(one, wanted, atol=5e-6, err_msg=str(axes))
print("all equal")
"""


@pytest.mark.slow
def test_attention_on_eight_devices_is_that_of_one():
  eight_devices.run(_CHECKS)
