"""Causal grouped-query attention with ALiBi slopes and document boundaries.

`attention` is the one signature. Its back ends: `reference` holds the whole
L x S matrix; `blocked` (`blocked_attention.py`) is linear in memory.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from moe_lab.ops.blocked_attention import MASKED, blocked_attention


def reference_attention(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset):
  """As `attention`, holding all logits in float32."""
  q_BLMGH = rearrange(q_BLNH, "B L (M G) H -> B L M G H", M=k_BSMH.shape[2])
  logits = jnp.einsum("BLMGH,BSMH->BMGLS", q_BLMGH, k_BSMH, preferred_element_type=jnp.float32)
  logits *= q_BLNH.shape[-1] ** -0.5
  distance_LS = offset + jnp.arange(q_BLNH.shape[1])[:, None] - jnp.arange(k_BSMH.shape[1])[None, :]
  logits -= slope_M[:, None, None, None] * distance_LS.astype(jnp.float32)
  seen_BLS = (distance_LS >= 0) & (segment_BL[:, :, None] == segment_BS[:, None, :])
  weights = jax.nn.softmax(jnp.where(seen_BLS[:, None, None], logits, MASKED), axis=-1)
  out = jnp.einsum("BMGLS,BSMH->BLMGH", weights.astype(v_BSMH.dtype), v_BSMH, preferred_element_type=jnp.float32)
  return rearrange(out, "B L M G H -> B L (M G) H").astype(q_BLNH.dtype)


def attention(
  q_BLNH: jax.Array,
  k_BSMH: jax.Array,
  v_BSMH: jax.Array,
  slope_M: jax.Array,
  segment_BL: jax.Array,
  segment_BS: jax.Array,
  *,
  offset: jax.Array | int = 0,
  backend: str = "auto",
  block: int = 64,
) -> jax.Array:
  """softmax(q.k / sqrt(H) - slope * distance) over earlier keys of the same document.

  Args:
    q_BLNH: queries; heads of one KV group are neighbours: n = m * G + g.
    k_BSMH: keys; key s stands at position s.
    v_BSMH: values.
    slope_M: float32, logit per token of distance, by KV group (ALiBi, arXiv 2108.12409).
    segment_BL: int32, the document of each query.
    segment_BS: int32, the document of each key.
    offset: position of the first query (0 in training; the cache's fill in decoding).
    backend: reference | blocked | auto: blocked where there is more than one block of queries.
    block: rows and columns of a block.

  Returns:
    [B, L, N, H], in the queries' dtype.
  """
  if backend == "auto":
    backend = "blocked" if q_BLNH.shape[1] > block else "reference"
  arguments = (q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, jnp.asarray(offset, jnp.int32))
  if backend == "reference":
    return reference_attention(*arguments)
  if backend == "blocked":
    return blocked_attention(*arguments, block)
  raise ValueError(f"attention backend {backend!r}: wanted auto, reference or blocked")
