"""Attention on several devices: each has some sequences, or a stretch of every sequence.

The TPU's kernel cannot be cut by XLA's partitioner, and needs not be: sequences are independent, and so are the queries
of one. With fewer sequences than devices, as at 128K tokens, a device takes L / devices queries in a row and all
keys, which it gathers; its position is the attention's `offset`. Keys are gathered by all, also those of groups whose
windows end before: 2 * M * H numbers a token. A group that sees everything costs the last device twice the mean.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_lab.ops.attention import attention
from moe_lab.sharding.expert import AXES, TOKENS


def tokens_spec(mesh: Mesh | None, batch: int, length: int) -> P:
  """Returns how [B, L, ...] is spread: by sequences, or by stretches of each; P() where neither number is divisible."""
  if mesh is None or mesh.size == 1:
    return P()
  if batch % mesh.size == 0:
    return TOKENS
  return P(None, AXES) if length % mesh.size == 0 else P()


def spread(x_BL: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Asks for `tokens_spec`, of an array [B, L, ...]; changes nothing on one device."""
  spec = tokens_spec(mesh, *x_BL.shape[:2])
  return x_BL if spec == P() else jax.lax.with_sharding_constraint(x_BL, NamedSharding(mesh, spec))


@jax.custom_vjp
def _gather(x_BSMH):
  return jax.lax.all_gather(x_BSMH, AXES, axis=1, tiled=True)


def _scatter_gradient(_, d_BSMH):
  # Every device has a share of each key's gradient: added in float32.
  d = jax.lax.psum_scatter(d_BSMH.astype(jnp.float32), AXES, scatter_dimension=1, tiled=True)
  return (d.astype(d_BSMH.dtype),)


_gather.defvjp(lambda x_BSMH: (_gather(x_BSMH), None), _scatter_gradient)


def spread_attention(
  q_BLNH: jax.Array,
  k_BLMH: jax.Array,
  v_BLMH: jax.Array,
  slope_M: jax.Array,
  segment_BL: jax.Array,
  mesh: Mesh | None,
  *,
  offset: jax.Array | int = 0,
  **how,
) -> jax.Array:
  """As `ops.attention.attention` of sequences to themselves, on all devices of a mesh.

  Args:
    q_BLNH: queries, as there; and so on.
    k_BLMH: keys of the same tokens.
    v_BLMH: values.
    slope_M: slopes.
    segment_BL: documents.
    mesh: of devices, with axes "data" and "expert"; None: one device.
    offset: position of the first query.
    how: window_M, backend and block of `attention`.

  Returns:
    [B, L, N, H], spread as `tokens_spec` says.
  """
  run = functools.partial(attention, **how)
  if mesh is None or mesh.size == 1:
    return run(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, segment_BL, offset=offset)
  spec = tokens_spec(mesh, *segment_BL.shape)
  stretches = spec == P(None, AXES)

  def local(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset):
    if stretches:
      k_BSMH, v_BSMH = _gather(k_BSMH), _gather(v_BSMH)
      offset += jax.lax.axis_index(AXES) * q_BLNH.shape[1]
    return run(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset=offset)

  in_specs = (spec, spec, spec, P(), spec, P() if stretches else spec, P())
  # The check of what varies over which axis does not know the kernels.
  on_devices = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
  return on_devices(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, segment_BL, jnp.asarray(offset, jnp.int32))
