"""Attention on several devices: each has some sequences, or a stretch of every sequence, and some of the heads.

The TPU's kernel cannot be cut by XLA's partitioner, and needs not be: sequences are independent, and so are the queries
of one, and the heads. With a stretch each, a device has L / devices queries in a row. Of KV groups with a window it
gets the keys of the few stretches before its own, their halo; of the others it gathers all keys. A group that sees
everything costs the last device twice the mean.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_lab.ops.attention import attention
from moe_lab.sharding.gather import gathered
from moe_lab.sharding.rules import num_along, token_spec


def halos(window_M: tuple[int | None, ...], stretch: int, devices: int) -> list[tuple[slice, int | None]]:
  """Returns (KV groups, stretches before its own that a device gets), neighbours alike put together; None: all.

  Args:
    window_M: keys that a query sees, its own included.
    stretch: tokens of a device.
    devices: along the sequence.
  """
  parts = []
  for group, window in enumerate(window_M):
    hops = None if window is None else -(-(window - 1) // stretch)
    if hops is not None and 2 * (hops + 1) > devices:
      hops = None  # about as many as there are
    if parts and parts[-1][1] == hops:
      parts[-1] = slice(parts[-1][0].start, group + 1), hops
    else:
      parts.append((slice(group, group + 1), hops))
  return parts


def _with_halo(x_BS: jax.Array, axes, devices: int, hops: int) -> jax.Array:
  """Returns the stretches before a device's own, and its own; zeros where the sequence has not begun."""
  # In float32, so that gradients of a key from several devices are added in it.
  x = x_BS.astype(jnp.float32) if jnp.issubdtype(x_BS.dtype, jnp.floating) else x_BS
  before = [
    jax.lax.ppermute(x, axes, [(device, device + hop) for device in range(devices - hop)]) for hop in range(hops, 0, -1)
  ]
  return jnp.concatenate([*before, x], axis=1).astype(x_BS.dtype)


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
  tokens = token_spec(mesh, *segment_BL.shape)
  axes = tokens[1] if len(tokens) > 1 else None  # that a sequence's tokens are spread over
  devices = num_along(mesh, axes)
  window_M = common_windows(window_M, mesh.shape["model"])
  parts = halos(window_M, segment_BL.shape[1] // devices, devices)

  def whole(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, offset):
    return attention(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, segment_BL, window_M=window_M, offset=offset, **how)

  def stretch(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, offset):
    outs, per_group = [], q_BLNH.shape[2] // k_BLMH.shape[2]
    for groups, hops in parts:
      keys = k_BLMH[:, :, groups], v_BLMH[:, :, groups]
      if hops is None:
        keys = (gathered(x, axes, 1, x.dtype) for x in keys)
        segment_BS = jax.lax.all_gather(segment_BL, axes, axis=1, tiled=True)
        first = offset + jax.lax.axis_index(axes) * segment_BL.shape[1]
      else:
        keys = (_with_halo(x, axes, devices, hops) for x in keys)
        segment_BS = _with_halo(segment_BL, axes, devices, hops)
        first = hops * segment_BL.shape[1]
      q = q_BLNH[:, :, groups.start * per_group : groups.stop * per_group]
      windows = window_M[groups]
      outs.append(attention(q, *keys, slope_M[groups], segment_BL, segment_BS, window_M=windows, offset=first, **how))
    return jnp.concatenate(outs, axis=2)

  heads = P(*(tokens or (None, None)), "model")
  # The check of what varies over which axis does not know the kernels.
  run = jax.shard_map(
    whole if devices == 1 else stretch,
    mesh=mesh,
    in_specs=(heads, heads, heads, P("model"), tokens, P()),
    out_specs=heads,
    check_vma=False,
  )
  return run(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, jnp.asarray(offset, jnp.int32))
