"""Attention on several devices: each has some sequences, or a stretch of every sequence, and some of the heads.

The TPU's kernel cannot be cut by XLA's partitioner, and needs not be: sequences are independent, and so are the queries
of one, and the heads. With a stretch each, a device has L / devices queries in a row and all keys, which it gathers;
its position is the attention's `offset`. Keys are gathered by all, also those of groups whose windows end before:
2 * M * H numbers a token. A group that sees everything costs the last device twice the mean.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_lab.ops.attention import attention
from moe_lab.sharding.gather import gathered
from moe_lab.sharding.rules import token_spec


def common_windows(window_M: tuple[int | None, ...], devices: int) -> tuple[int | None, ...]:
  """Returns the windows of the groups that a device has, wide enough for each device.

  One program runs on all; the j-th group of each gets the widest of their windows. That costs no time, since all
  wait for the device that has the widest.
  """
  own = len(window_M) // devices
  parts = [window_M[first : first + own] for first in range(0, len(window_M), own)]
  return tuple(None if None in groups else max(groups) for groups in zip(*parts, strict=True))


def spread_attention(
  q_BLNH: jax.Array,
  k_BLMH: jax.Array,
  v_BLMH: jax.Array,
  slope_M: jax.Array,
  segment_BL: jax.Array,
  mesh: Mesh | None,
  *,
  window_M: tuple[int | None, ...],
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
    mesh: of devices; None: one device.
    window_M: of the groups.
    offset: position of the first query.
    how: backend and block of `attention`.

  Returns:
    [B, L, N, H], spread as `token_spec` says, heads over "model".
  """
  if mesh is None or mesh.size == 1:
    run = functools.partial(attention, window_M=window_M, **how)
    return run(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, segment_BL, offset=offset)
  run = functools.partial(attention, window_M=common_windows(window_M, mesh.shape["model"]), **how)
  tokens = token_spec(mesh, *segment_BL.shape)
  by_stretch = tokens[1] if len(tokens) > 1 else None  # the axes that a sequence's tokens are spread over
  if by_stretch == "sequence" and mesh.shape["sequence"] == 1:
    by_stretch = None

  def local(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset):
    if by_stretch:
      k_BSMH, v_BSMH = (gathered(x, by_stretch, 1, x.dtype) for x in (k_BSMH, v_BSMH))
      offset += jax.lax.axis_index(by_stretch) * q_BLNH.shape[1]
    return run(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset=offset)

  heads = P(*(tokens if tokens else (None, None)), "model")
  all_keys = P(tokens[0]) if tokens else P()
  in_specs = (heads, heads, heads, P("model"), tokens, all_keys if by_stretch else tokens, P())
  # The check of what varies over which axis does not know the kernels.
  on_devices = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=False)
  return on_devices(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, segment_BL, jnp.asarray(offset, jnp.int32))
