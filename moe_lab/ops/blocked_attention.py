"""Attention in blocks with an online softmax: memory linear in length.

FlashAttention's recurrence (arXiv 2205.14135) in plain XLA: the forward pass
keeps the output and the log of each row's softmax denominator; the backward
pass recomputes the weights block by block. Blocks of keys after a block of
queries are never visited, nor are those before the window of a KV group, by
loops whose length depends on the block and which therefore have no reverse
derivative of their own. Groups that look equally far share a loop, so that one
which sees everything does not drag the others along.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moe_lab.ops.row_sum import row_sum

MASKED = -1e30  # finite, so that a row without keys gives numbers and not NaN


def pad_length(x, multiple: int, axis: int, value=0):
  """Fills an axis at its end with `value`, up to a multiple."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths, constant_values=value)


def _cut(x, index, block: int, axis: int):
  return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _add_at(x, update, index, block: int, axis: int):
  return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, index, block, axis) + update, index * block, axis)


def _block_logits(q, k, slope_M, segment_q, segment_k, lead):
  """Masked fp32 logits [B, M, G, block, block]; the first query stands `lead` positions after the first key."""
  logits = jnp.einsum("BMGLH,BMSH->BMGLS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  distance = lead + jnp.arange(q.shape[3])[:, None] - jnp.arange(k.shape[2])[None, :]
  logits -= slope_M[:, None, None, None] * distance.astype(jnp.float32)
  seen = (distance >= 0) & (segment_q[:, :, None] == segment_k[:, None, :])
  return jnp.where(seen[:, None, None], logits, MASKED)


def _block_range(offset, index_q, block: int, num_key_blocks: int, window: int | None):
  """The blocks of keys that the queries of block `index_q` see and that reach into their windows: first, end."""
  end = jnp.minimum((offset + (index_q + 1) * block - 1) // block + 1, num_key_blocks)
  if window is None:
    return jnp.zeros_like(end), end
  return jnp.clip((offset + index_q * block - window + 1) // block, 0, end), end


def blocks_visited(num_queries: int, num_keys: int, window: int | None, *, block: int = 64, offset: int = 0) -> int:
  """Returns how many blocks [block, block] of logits a query head computes; window None: all that causality leaves."""
  index_q = jnp.arange(-(-num_queries // block))
  first, end = _block_range(offset, index_q, block, -(-num_keys // block), window)
  return int((end - first).sum())


def _forward(q, k, v, slope_M, segment_q, segment_k, offset, block, window):
  """q: [B, M, G, L, H]; k, v: [B, M, S, H]; lengths are multiples of `block`. Returns out and log-denominators."""
  num_key_blocks = k.shape[2] // block

  def one_query_block(index_q):
    q_block, segment_q_block = _cut(q, index_q, block, 3), _cut(segment_q, index_q, block, 1)

    def visit(index_k, carry):
      out, denominator, highest = carry
      logits = _block_logits(
        q_block,
        _cut(k, index_k, block, 2),
        slope_M,
        segment_q_block,
        _cut(segment_k, index_k, block, 1),
        offset + (index_q - index_k) * block,
      )
      new_highest = jnp.maximum(highest, logits.max(-1))
      weights = jnp.exp(logits - new_highest[..., None])
      scale = jnp.exp(highest - new_highest)
      values = jnp.einsum(
        "BMGLS,BMSH->BMGLH", weights.astype(v.dtype), _cut(v, index_k, block, 2), preferred_element_type=jnp.float32
      )
      return out * scale[..., None] + values, denominator * scale + row_sum(weights), new_highest

    rows = q_block.shape[:-1]
    start = (jnp.zeros(q_block.shape, jnp.float32), jnp.zeros(rows), jnp.full(rows, MASKED))
    seen = _block_range(offset, index_q, block, num_key_blocks, window)
    out, denominator, highest = jax.lax.fori_loop(*seen, visit, start)
    # Only padding has an empty row; it must not divide by zero.
    denominator = jnp.maximum(denominator, 1e-30)
    return (out / denominator[..., None]).astype(q.dtype), highest + jnp.log(denominator)

  out, log_denominator = jax.lax.map(one_query_block, jnp.arange(q.shape[3] // block))
  return rearrange(out, "i B M G L H -> B M G (i L) H"), rearrange(log_denominator, "i B M G L -> B M G (i L)")


def _backward(q, k, v, slope_M, segment_q, segment_k, offset, out, log_denominator, d_out, block, window):
  """Gradients of q, k and v; arrays as in `_forward`."""
  num_key_blocks = k.shape[2] // block
  scale = q.shape[-1] ** -0.5

  def one_query_block(d_keys_values, index_q):
    q_block, d_out_block = _cut(q, index_q, block, 3), _cut(d_out, index_q, block, 3)
    q_turned, d_out_turned = q_block.mT, d_out_block.mT
    segment_q_block = _cut(segment_q, index_q, block, 1)
    log_denominator_block = _cut(log_denominator, index_q, block, 3)
    # Row sums of d_weights * weights: the softmax's own correction (FlashAttention, section 3.1).
    out_block = _cut(out, index_q, block, 3).astype(jnp.float32)
    correction_block = row_sum(d_out_block.astype(jnp.float32) * out_block)

    def visit(index_k, carry):
      d_q, d_k, d_v = carry
      k_block, v_block = _cut(k, index_k, block, 2), _cut(v, index_k, block, 2)
      logits = _block_logits(
        q_block,
        k_block,
        slope_M,
        segment_q_block,
        _cut(segment_k, index_k, block, 1),
        offset + (index_q - index_k) * block,
      )
      weights = jnp.exp(logits - log_denominator_block[..., None])
      d_weights = jnp.einsum("BMGLH,BMSH->BMGLS", d_out_block, v_block, preferred_element_type=jnp.float32)
      d_logits = (weights * (d_weights - correction_block[..., None]) * scale).astype(q.dtype)
      d_q += jnp.einsum("BMGLS,BMSH->BMGLH", d_logits, k_block, preferred_element_type=jnp.float32)
      # Transposed: the small factor is turned for the dot, where CPU would turn the block of logits.
      d_k_block = jnp.einsum("BMGHL,BMGLS->BMHS", q_turned, d_logits, preferred_element_type=jnp.float32)
      d_v_block = jnp.einsum(
        "BMGHL,BMGLS->BMHS", d_out_turned, weights.astype(q.dtype), preferred_element_type=jnp.float32
      )
      return d_q, _add_at(d_k, d_k_block, index_k, block, 3), _add_at(d_v, d_v_block, index_k, block, 3)

    start = (jnp.zeros(q_block.shape, jnp.float32), *d_keys_values)
    seen = _block_range(offset, index_q, block, num_key_blocks, window)
    d_q, d_k, d_v = jax.lax.fori_loop(*seen, visit, start)
    return (d_k, d_v), d_q

  start = (jnp.zeros(k.mT.shape, jnp.float32), jnp.zeros(v.mT.shape, jnp.float32))
  (d_k, d_v), d_q = jax.lax.scan(one_query_block, start, jnp.arange(q.shape[3] // block))
  d_q = rearrange(d_q, "i B M G L H -> B M G (i L) H")
  return d_q.astype(q.dtype), d_k.mT.astype(k.dtype), d_v.mT.astype(v.dtype)


def _queries(x_BLNH, num_kv_heads: int, block: int):
  return pad_length(rearrange(x_BLNH, "B L (M G) H -> B M G L H", M=num_kv_heads), block, 3)


def _blocks(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset, block: int):
  """The inputs of `_forward`, padded to whole blocks."""
  k, v = (pad_length(rearrange(x, "B S M H -> B M S H"), block, 2) for x in (k_BSMH, v_BSMH))
  # Padding keys stand after every query (offset + L <= S), so causality hides them.
  segment_q, segment_k = pad_length(segment_BL, block, 1, -1), pad_length(segment_BS, block, 1, -2)
  return _queries(q_BLNH, k_BSMH.shape[2], block), k, v, slope_M, segment_q, segment_k, offset


def _by_window(run: Callable, window_M: Sequence[int | None], num_keys: int, block: int, arrays: Sequence[jax.Array]):
  """Calls `run` for each set of KV groups that look equally many blocks far, and puts its results together again.

  Args:
    run: called with the arrays' groups and a window; its results have the groups on axis 1.
    window_M: of each group.
    num_keys: S; a window of so many keys is none.
    block: of keys.
    arrays: those that differ by group, which is axis 1, or the only one.
  """
  far = [None if window is None or window >= num_keys else -(-window // block) * block for window in window_M]
  sets = [[m for m, other in enumerate(far) if other == window] for window in dict.fromkeys(far)]
  if len(sets) == 1:
    return run(arrays, far[0])
  parts = [
    run([x[np.array(groups)] if x.ndim == 1 else x[:, np.array(groups)] for x in arrays], far[groups[0]])
    for groups in sets
  ]
  place = np.argsort(np.concatenate(sets))
  return [jnp.concatenate(part, axis=1)[:, place] for part in zip(*parts, strict=True)]


def blocked_forward(*inputs, block: int, window_M: Sequence[int | None]):
  """Returns out_BLNH and the log of the softmax's denominator, float32 [B, N, L].

  Inputs as in `attention.attention`; no array is larger than inputs, outputs and [B, N, block, block].
  """
  length, num_keys = inputs[0].shape[1], inputs[1].shape[1]
  q, k, v, slope_M, segment_q, segment_k, offset = _blocks(*inputs, block)

  def run(arrays, window):
    return _forward(*arrays, segment_q, segment_k, offset, block, window)

  out, log_denominator = _by_window(run, window_M, num_keys, block, (q, k, v, slope_M))
  out_BLNH = rearrange(out[:, :, :, :length], "B M G L H -> B L (M G) H")
  return out_BLNH, rearrange(log_denominator[..., :length], "B M G L -> B (M G) L")


def blocked_backward(*inputs_and_outputs, block: int, window_M: Sequence[int | None]):
  """Returns the gradients of q_BLNH, k_BSMH and v_BSMH.

  Args:
    inputs_and_outputs: those of `blocked_forward`, then out_BLNH's gradient.
    block: as there.
    window_M: as there.
  """
  *inputs, out_BLNH, log_denominator_BNL, d_out_BLNH = inputs_and_outputs
  length, (num_keys, num_kv_heads) = out_BLNH.shape[1], inputs[1].shape[1:3]
  q, k, v, slope_M, segment_q, segment_k, offset = _blocks(*inputs, block)
  out, d_out = (_queries(x, num_kv_heads, block) for x in (out_BLNH, d_out_BLNH))
  log_denominator = rearrange(log_denominator_BNL, "B (M G) L -> B M G L", M=num_kv_heads)
  log_denominator = pad_length(log_denominator, block, 3)

  def run(arrays, window):
    *inputs, out, log_denominator, d_out = arrays
    return _backward(*inputs, segment_q, segment_k, offset, out, log_denominator, d_out, block, window)

  arrays = (q, k, v, slope_M, out, log_denominator, d_out)
  d_q, d_k, d_v = _by_window(run, window_M, num_keys, block, arrays)
  d_k_BSMH, d_v_BSMH = (rearrange(d[:, :, :num_keys], "B M S H -> B S M H") for d in (d_k, d_v))
  return rearrange(d_q[:, :, :, :length], "B M G L H -> B L (M G) H"), d_k_BSMH, d_v_BSMH
