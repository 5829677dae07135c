"""The cache of decoding on several devices: each has some of the sequences, and of these some KV groups.

Sequences are spread over the batch axes, KV groups over "model". A ring's j-th group is that of every device along
"model", so its size is what the widest of their windows asks for (`common_windows`). A step of decoding is each
device's own affair. A chunk of prompts is seen by all: who has a prompt's row writes it and attends, and the others
get the result by a sum.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_lab.ops.ring import Ring, ring_attention, write
from moe_lab.sharding.rules import batch_sharding
from moe_lab.sharding.sequence import common_windows


def ring_spec(mesh: Mesh, rows: int) -> P:
  """Returns how a ring [B, W, M, H] is spread."""
  return P(*batch_sharding(mesh, rows).spec or (None,), None, "model")


def _by_ring(cache: tuple[Ring, ...], window_M, heads: int):
  """Yields for each ring its KV groups, their query heads, and the widest of their windows."""
  first = 0
  for ring in cache:
    last = first + ring.num_groups
    widest = max(window_M[first:last], key=lambda window: math.inf if window is None else window)
    yield ring, slice(first, last), slice(first * heads, last * heads), widest
    first = last


def _attend(q_BLNH, k_BLMH, v_BLMH, slope_M, real_BL, offset_B, cache, row_B, *, window_M, axes, **how):
  """One device's part; `axes`: of the mesh, over which the cache's rows are spread, where row_B says whose they are."""
  position_BL = offset_B[:, None] + jnp.arange(q_BLNH.shape[1])
  end_B = offset_B + real_BL.sum(1)
  own = cache[0].k_BWMH.shape[0]
  place_B = jnp.arange(q_BLNH.shape[0]) if row_B is None else row_B
  if axes:
    row_B = place_B - jax.lax.axis_index(axes) * own
    mine_B = (row_B >= 0) & (row_B < own)
    place_B, row_B = jnp.where(mine_B, row_B, own), jnp.clip(row_B, 0, own - 1)  # `write` leaves out row `own`
  outs, rings = [], []
  for ring, groups, heads, window in _by_ring(cache, window_M, q_BLNH.shape[2] // k_BLMH.shape[2]):
    ring = write(ring, place_B, k_BLMH[:, :, groups], v_BLMH[:, :, groups], position_BL, real_BL)
    rings.append(ring)
    run = functools.partial(_one_ring, slope_M=slope_M[groups], window=window, ring=ring, **how)
    queries = q_BLNH[:, :, heads], row_B, position_BL, end_B
    if axes:
      outs.append(
        jnp.concatenate([_if_mine(run, mine_B[b], *(x[b : b + 1] for x in queries)) for b in range(len(mine_B))])
      )
    else:
      outs.append(run(*queries))
  out_BLNH = jnp.concatenate(outs, axis=2)
  return jax.lax.psum(out_BLNH, axes) if axes else out_BLNH, tuple(rings)


def _one_ring(q_BLNH, row_B, position_BL, end_B, *, slope_M, window, ring, **how):
  return ring_attention(q_BLNH, ring, row_B, slope_M, window, position_BL, end_B, **how)


def _if_mine(run, mine, q_1LNH, *of_row):
  return jax.lax.cond(mine, run, lambda q_1LNH, *_: jnp.zeros_like(q_1LNH), q_1LNH, *of_row)


def spread_cached_attention(
  q_BLNH: jax.Array,
  k_BLMH: jax.Array,
  v_BLMH: jax.Array,
  slope_M: jax.Array,
  real_BL: jax.Array,
  offset_B: jax.Array,
  cache: tuple[Ring, ...],
  row_B: jax.Array | None,
  mesh: Mesh | None,
  *,
  window_M: tuple[int | None, ...],
  **how,
) -> tuple[jax.Array, tuple[Ring, ...]]:
  """Writes new keys into a layer's cache and attends to it.

  Args:
    q_BLNH: queries, as in `ops.attention.attention`; and so on.
    k_BLMH: keys of the same tokens.
    v_BLMH: values.
    slope_M: slopes.
    real_BL: bool, what is not padding at a sequence's end.
    offset_B: position of each sequence's first query.
    cache: a layer's rings, spread by `ring_spec`; KV groups in order, on each device.
    row_B: int32, the cache's row of each sequence; None: each in its place.
    mesh: of devices; None: one device.
    window_M: of the groups.
    how: backend and block of `ring_attention`.

  Returns:
    [B, L, N, H], and the cache.
  """
  if mesh is None or mesh.size == 1:
    run = functools.partial(_attend, window_M=window_M, axes=(), **how)
    return run(q_BLNH, k_BLMH, v_BLMH, slope_M, real_BL, offset_B, cache, row_B)
  window_M = common_windows(window_M, mesh.shape["model"])
  rings = ring_spec(mesh, cache[0].k_BWMH.shape[0])
  spread_rows = rings[0]
  # Decoding's queries are where their rows are; a chunk's are everywhere.
  mine = spread_rows if row_B is None else None
  heads = P(mine, None, "model")
  axes = spread_rows if row_B is not None and spread_rows else ()
  # The check of what varies over which axis does not know the kernels.
  run = jax.shard_map(
    functools.partial(_attend, window_M=window_M, axes=axes, **how),
    mesh=mesh,
    in_specs=(heads, heads, heads, P("model"), P(mine), P(mine), rings, P()),
    out_specs=(heads, rings),
    check_vma=False,
  )
  return run(q_BLNH, k_BLMH, v_BLMH, slope_M, real_BL, offset_B, cache, row_B)
