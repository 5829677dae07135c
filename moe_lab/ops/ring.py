"""The key/value cache of decoding: rings that hold what a KV group can still see, and attention over them.

The key of position p lies in slot p mod W of its group's ring; groups with equal rings share one. A ring holds the
window and one more chunk, so a chunk's keys are written before its queries read, and still no query misses a key.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from moe_lab.ops import native
from moe_lab.ops.attention import attention
from moe_lab.ops.blocked_attention import MASKED


class Ring(NamedTuple):
  """Keys and values of some neighbouring KV groups of one layer, [B, W, M, H]."""

  k_BWMH: jax.Array
  v_BWMH: jax.Array

  @property
  def size(self) -> int:
    """W."""
    return self.k_BWMH.shape[1]

  @property
  def num_groups(self) -> int:
    """M."""
    return self.k_BWMH.shape[2]


def write(
  ring: Ring, row_B: jax.Array, k_BLMH: jax.Array, v_BLMH: jax.Array, position_BL: jax.Array, real_BL: jax.Array
) -> Ring:
  """Returns the ring with new keys and values in its rows `row_B`; those not `real_BL` are left out."""
  slot_BL = jnp.where(real_BL, position_BL % ring.size, ring.size)

  def put(old_BWMH, new_BLMH):
    return old_BWMH.at[row_B[:, None], slot_BL].set(new_BLMH.astype(old_BWMH.dtype), mode="drop")

  return Ring(put(ring.k_BWMH, k_BLMH), put(ring.v_BWMH, v_BLMH))


def reference_ring_attention(q_BLNH, ring: Ring, slope_M, window: int | None, position_BL, end_B):
  """As `ring_attention` with every row in its place, holding all logits in float32."""
  q_BLMGH = rearrange(q_BLNH, "B L (M G) H -> B L M G H", M=ring.num_groups)
  logits = jnp.einsum("BLMGH,BWMH->BMGLW", q_BLMGH, ring.k_BWMH, preferred_element_type=jnp.float32)
  last_B1 = end_B[:, None] - 1
  held_BW = last_B1 - (last_B1 - jnp.arange(ring.size)) % ring.size  # the position in each slot; negative: nothing
  distance_BLW = position_BL[:, :, None] - held_BW[:, None, :]
  seen_BLW = (distance_BLW >= 0) & (held_BW >= 0)[:, None, :]
  if window is not None:
    seen_BLW &= distance_BLW < window
  logits *= q_BLNH.shape[-1] ** -0.5
  logits -= slope_M[:, None, None, None] * distance_BLW[:, None, None].astype(jnp.float32)
  weights = jax.nn.softmax(jnp.where(seen_BLW[:, None, None], logits, MASKED), axis=-1)
  out = jnp.einsum("BMGLW,BWMH->BLMGH", weights.astype(q_BLNH.dtype), ring.v_BWMH, preferred_element_type=jnp.float32)
  return rearrange(out, "B L M G H -> B L (M G) H").astype(q_BLNH.dtype)


def _native_step(q_B1NH, ring: Ring, slope_M, window: int | None, end_B):
  """One query a sequence, the last that was written, by the CPU kernel."""
  q_BNH = q_B1NH[:, 0]
  (out_BNH,) = native.call("attention_step", [q_BNH.shape], q_BNH, *ring, slope_M, end_B, jnp.int32(window or 0))
  return out_BNH[:, None].astype(q_B1NH.dtype)


def _chunk(q_1LNH, ring: Ring, row, slope_M, window: int | None, start, end, backend: str, block: int):
  """A chunk of one sequence: its ring unrolled, so that slot 0 holds position `first`, it is training's attention."""
  first = jnp.maximum(end - ring.size, 0)
  k_1SMH, v_1SMH = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in ring)
  if window is not None:  # else it never wraps
    k_1SMH, v_1SMH = (jnp.roll(x, -first, axis=1) for x in (k_1SMH, v_1SMH))
  # Causality hides what lies behind the last real key, and what padding gives is nobody's concern.
  segments = (jnp.ones((1, length), jnp.int32) for length in (q_1LNH.shape[1], ring.size))
  return attention(q_1LNH, k_1SMH, v_1SMH, slope_M, *segments, offset=start - first, backend=backend, block=block)


def ring_attention(
  q_BLNH: jax.Array,
  ring: Ring,
  row_B: jax.Array | None,
  slope_M: jax.Array,
  window: int | None,
  position_BL: jax.Array,
  end_B: jax.Array,
  *,
  backend: str = "auto",
  block: int = 0,
) -> jax.Array:
  """Attention of new queries over a ring that already holds their keys.

  Args:
    q_BLNH: queries of the ring's groups.
    ring: of at least window + L - 1 slots.
    row_B: int32, the ring's row of each sequence; None: each row in its place, as single queries (L = 1) want it.
    slope_M: float32, as in `attention`.
    window: keys that a query looks at, itself included; None: all, and the ring has never wrapped.
    position_BL: int32, of the queries, one after the other.
    end_B: int32, positions that were written, the queries' own included.
    backend: as in `attention`; auto takes the CPU kernel for single queries too, where it can be built.
    block: as in `attention`.

  Returns:
    [B, L, N, H], in the queries' dtype; of queries that are padding, anything finite.
  """
  single = q_BLNH.shape[1] == 1
  if backend == "reference" or single:
    # The kernel computes in float32: of rings in another type it would make a copy at every step.
    fits = ring.k_BWMH.dtype == jnp.float32 and native.used_here()
    if single and row_B is None and (backend == "native" or (backend == "auto" and fits)):
      native.register()
      step = functools.partial(_native_step, window=window)
      if backend == "native":
        return step(q_BLNH, ring, slope_M, end_B=end_B)
      # Decided when it is lowered, which may be for another machine than this.
      return jax.lax.platform_dependent(
        q_BLNH, ring, slope_M, position_BL, end_B,
        cpu=lambda q, ring, slope_M, _, end_B: step(q, ring, slope_M, end_B=end_B),
        default=lambda q, ring, slope_M, *positions: reference_ring_attention(q, ring, slope_M, window, *positions),
      )  # fmt: skip
    ring = ring if row_B is None else Ring(*(x[row_B] for x in ring))
    return reference_ring_attention(q_BLNH, ring, slope_M, window, position_BL, end_B)
  rows = jnp.arange(q_BLNH.shape[0]) if row_B is None else row_B
  outs = [
    _chunk(q_BLNH[b : b + 1], ring, rows[b], slope_M, window, position_BL[b, 0], end_B[b], backend, block)
    for b in range(q_BLNH.shape[0])
  ]
  return jnp.concatenate(outs)
