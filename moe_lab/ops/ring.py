"""The key/value cache of decoding: rings that hold what a KV group can still see, and attention over them.

The key of position p lies in slot p mod W of its group's ring; groups with equal rings share one. A ring holds the
window and one more chunk, so a chunk's keys are written before its queries read, and still no query misses a key.
"""

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


def write(ring: Ring, k_BLMH: jax.Array, v_BLMH: jax.Array, position_BL: jax.Array, real_BL: jax.Array) -> Ring:
  """Returns the ring with new keys and values at their positions; those not `real_BL` are left out."""
  slot_BL = jnp.where(real_BL, position_BL % ring.size, ring.size)
  row_B1 = jnp.arange(k_BLMH.shape[0])[:, None]

  def put(old_BWMH, new_BLMH):
    return old_BWMH.at[row_B1, slot_BL].set(new_BLMH.astype(old_BWMH.dtype), mode="drop")

  return Ring(put(ring.k_BWMH, k_BLMH), put(ring.v_BWMH, v_BLMH))


def reference_ring_attention(q_BLNH, ring: Ring, slope_M, window: int | None, position_BL, end_B):
  """As `ring_attention`, holding all logits in float32; any number of sequences and queries."""
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


def ring_attention(
  q_BLNH: jax.Array,
  ring: Ring,
  slope_M: jax.Array,
  window: int | None,
  position_BL: jax.Array,
  end_B: jax.Array,
  *,
  backend: str = "auto",
  block: int = 64,
) -> jax.Array:
  """Attention of new queries over a ring that already holds their keys.

  Args:
    q_BLNH: queries of the ring's groups. A chunk (L > 1) is of one sequence, but for the reference.
    ring: of at least window + L - 1 slots.
    slope_M: float32, as in `attention`.
    window: keys that a query looks at, itself included; None: all, and the ring has never wrapped.
    position_BL: int32, of the queries, one after the other.
    end_B: int32, positions that were written, the queries' own included.
    backend: as in `attention`; auto takes the CPU kernel for single queries too, where it can be built.
    block: as in `attention`.

  Returns:
    [B, L, N, H], in the queries' dtype; of queries that are padding, anything finite.
  """
  length = q_BLNH.shape[1]
  if length == 1 and (backend == "native" or (backend == "auto" and native.used_here())):
    native.register()
    return _native_step(q_BLNH, ring, slope_M, window, end_B)
  if length == 1 or backend == "reference":
    return reference_ring_attention(q_BLNH, ring, slope_M, window, position_BL, end_B)
  # Unrolled, so that slot 0 holds position `first`, the keys are those of training; causality hides what lies behind
  # the last one, and padding is nobody's concern.
  first = jnp.maximum(end_B[0] - ring.size, 0)
  k_BSMH, v_BSMH = ring if window is None else (jnp.roll(x, -first, axis=1) for x in ring)
  segment_BL, segment_BS = jnp.ones((1, length), jnp.int32), jnp.ones((1, ring.size), jnp.int32)
  return attention(
    q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS,
    offset=position_BL[0, 0] - first, backend=backend, block=block,
  )  # fmt: skip
