"""Attention for TPU: a Pallas kernel that visits only the blocks which a KV group's window reaches.

The recurrence is that of `blocked_attention.py` (FlashAttention, arXiv
2205.14135). The queries of all heads of a KV group share a block, so that keys
and values are read once for them, and logits lie transposed, keys by queries:
what belongs to a query (maximum, denominator, correction) is then a row.

- The slope's part of a logit is computed in the kernel, in float32, from the integer distance: nothing is added to
  keys or queries, and no position is ever multiplied by a slope, so that it is as exact at position 131,071 as at 0.
- A step of the grid is a block of keys within the window of a block of queries. Groups that take equally many steps
  share a call. A step beyond the last block that a query may see keeps the index of that block: nothing is copied for
  it, and nothing computed.
- Float32 inputs are multiplied in float32 (the matrix unit's six passes), bfloat16 in bfloat16 with float32 sums.

Dimensions here: R rows of a block, of all G heads of a group, head by head; S keys of a block; the rest as in
`types.py`. Not run on a TPU yet: tested interpreted, and compiled ahead of time (`benchmarks/tpu_long_context.py`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_lab.errors import ConfigError
from moe_lab.ops.blocked_attention import MASKED, pad_length

KEYS = 512  # of a block
ROWS = 1024  # of a block, at most: a block of logits is then 2 MiB
INTERPRET = False  # tests set it: the kernel runs on any machine, slowly
_EVERYTHING = 2**30  # a window that no position is beyond


def check_here() -> None:
  """Raises ConfigError where programs for the default device cannot call the kernel."""
  if jax.default_backend() != "tpu" and not INTERPRET:
    wanted = f"auto, reference or blocked: the kernel needs a TPU, and the device here is {jax.default_backend()}"
    raise ConfigError("model.attention_backend", "tpu", wanted)


def _divide(a, b: int):
  """a // b of an a that is not negative. The operator asks the TPU, which is not here when compiling for it."""
  return jax.lax.div(a, jnp.int32(b))


class _Plan(NamedTuple):
  """How queries and keys are cut: sizes of blocks, and how many there are."""

  rows: int  # queries of a block, of one head
  keys: int
  num_query_blocks: int
  num_key_blocks: int

  def key_blocks(self, index_q, offset, window):
    """Returns the first and the last block of keys that the queries of block `index_q` look at."""
    start = offset + index_q * self.rows
    last = jnp.minimum(_divide(start + self.rows - 1, self.keys), self.num_key_blocks - 1)
    return jnp.minimum(_divide(jnp.maximum(start - window + 1, 0), self.keys), last), last

  def query_blocks(self, index_k, offset, window):
    """Returns the first and the last block of queries that look at the keys of block `index_k`; none: last < first."""
    first = _divide(jnp.maximum(index_k * self.keys - offset, 0), self.rows)
    # The last key's last query; with rows added, so that a negative one becomes 0.
    end = jnp.maximum((index_k + 1) * self.keys - 2 + window - offset, -self.rows) + self.rows
    return first, jnp.minimum(_divide(end, self.rows) - 1, self.num_query_blocks - 1)

  def steps(self, window: int | None) -> tuple[int, int]:
    """Returns the most blocks of keys that a block of queries looks at, and of queries that look at a block of keys."""
    if window is None:
      return self.num_key_blocks, self.num_query_blocks
    # As many as an interval of rows + window - 1 (keys + window - 1) positions can touch.
    touched = ((self.rows + window - 3) // self.keys + 2, (self.keys + window - 3) // self.rows + 2)
    return min(touched[0], self.num_key_blocks), min(touched[1], self.num_query_blocks)


def _plan(num_queries: int, num_keys: int, heads_per_group: int) -> _Plan:
  rows = 8
  while 2 * rows * heads_per_group <= ROWS and rows < num_queries:
    rows *= 2
  keys = min(KEYS, -(-num_keys // 128) * 128)
  return _Plan(rows, keys, -(-num_queries // rows), -(-num_keys // keys))


def steps_taken(num_queries: int, num_keys: int, heads_per_group: int, window: int | None) -> int:
  """Returns how many blocks of logits the forward pass has room for in its grid, for one KV group of one sequence."""
  plan = _plan(num_queries, num_keys, heads_per_group)
  return plan.num_query_blocks * plan.steps(window)[0]


def _dot(a, b, contract: tuple[int, int]):
  """A product in float32 sums over dimension contract[0] of a and contract[1] of b."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _logits_SR(k_SH, q_RH, segment_1S, segment_1R, slope, lead, rows: int):
  """Masked float32 logits; the first query stands `lead` positions after the first key."""
  num_keys, num_rows = k_SH.shape[0], q_RH.shape[0]
  row_1R = jax.lax.broadcasted_iota(jnp.int32, (1, num_rows), 1) & (rows - 1)
  distance_SR = lead + row_1R - jax.lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
  # Keys run down here: their documents, a row, are turned.
  segment_S1 = jnp.broadcast_to(segment_1S, (8, num_keys)).T[:, :1]
  logits_SR = _dot(k_SH, q_RH, (1, 1)) * q_RH.shape[1] ** -0.5 - slope * distance_SR.astype(jnp.float32)
  return jnp.where((distance_SR >= 0) & (segment_S1 == segment_1R), logits_SR, MASKED)


class _Scalars(NamedTuple):
  """What the kernels read before anything else; of the groups of a call, one entry each."""

  offset: jax.Array
  group: jax.Array  # which KV group of all it is
  window: jax.Array
  slope: jax.Array


def _flat(ref):
  """[G, rows, H] -> [R, H]."""
  heads, rows, width = ref.shape
  return ref[...].reshape(heads * rows, width)


def _forward_kernel(offset, group, window, slope, q, k, v, segment_q, segment_k, *rest, plan: _Plan):
  out, log_denominator, total_HR, denominator_1R, highest_1R = rest
  m, index_q, step = (pl.program_id(axis) for axis in (1, 2, 3))
  first, last = plan.key_blocks(index_q, offset[0], window[m])

  @pl.when(step == 0)
  def _():
    total_HR[...] = jnp.zeros_like(total_HR)
    denominator_1R[...] = jnp.zeros_like(denominator_1R)
    highest_1R[...] = jnp.full_like(highest_1R, MASKED)

  @pl.when(first + step <= last)
  def _():
    lead = offset[0] + index_q * plan.rows - (first + step) * plan.keys
    logits_SR = _logits_SR(k[...], _flat(q), segment_k[...], segment_q[...], slope[m], lead, plan.rows)
    new_1R = jnp.maximum(highest_1R[...], logits_SR.max(axis=0, keepdims=True))
    weights_SR = jnp.exp(logits_SR - new_1R)
    scale_1R = jnp.exp(highest_1R[...] - new_1R)
    total_HR[...] = total_HR[...] * scale_1R + _dot(v[...], weights_SR.astype(v.dtype), (0, 0))
    denominator_1R[...] = denominator_1R[...] * scale_1R + weights_SR.sum(axis=0, keepdims=True)
    highest_1R[...] = new_1R

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    out[...] = (total_HR[...] / denominator_1R[...]).T.reshape(out.shape).astype(out.dtype)
    log_denominator[...] = highest_1R[...] + jnp.log(denominator_1R[...])


def _weights_and_logit_gradients(q_RH, k_SH, v_SH, d_out_RH, logits_SR, log_denominator_1R, correction_1R):
  """The softmax's weights again, and the gradient of the products q.k."""
  weights_SR = jnp.exp(logits_SR - log_denominator_1R)
  d_weights_SR = _dot(v_SH, d_out_RH, (1, 1))
  d_logits_SR = weights_SR * (d_weights_SR - correction_1R) * q_RH.shape[1] ** -0.5
  return weights_SR.astype(q_RH.dtype), d_logits_SR.astype(q_RH.dtype)


def _queries_kernel(offset, group, window, slope, q, k, v, segment_q, segment_k, *rest, plan: _Plan):
  """Gradient of a block of queries, from all blocks of keys that they look at."""
  log_denominator, correction, d_out, d_q, total_HR = rest
  m, index_q, step = (pl.program_id(axis) for axis in (1, 2, 3))
  first, last = plan.key_blocks(index_q, offset[0], window[m])

  @pl.when(step == 0)
  def _():
    total_HR[...] = jnp.zeros_like(total_HR)

  @pl.when(first + step <= last)
  def _():
    q_RH, lead = _flat(q), offset[0] + index_q * plan.rows - (first + step) * plan.keys
    logits_SR = _logits_SR(k[...], q_RH, segment_k[...], segment_q[...], slope[m], lead, plan.rows)
    arrays = q_RH, k[...], v[...], _flat(d_out), logits_SR, log_denominator[...], correction[...]
    _, d_logits_SR = _weights_and_logit_gradients(*arrays)
    total_HR[...] += _dot(k[...], d_logits_SR, (0, 0))

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    d_q[...] = total_HR[...].T.reshape(d_q.shape).astype(d_q.dtype)


def _keys_kernel(offset, group, window, slope, q, k, v, segment_q, segment_k, *rest, plan: _Plan):
  """Gradients of a block of keys and values, from all blocks of queries that look at them."""
  log_denominator, correction, d_out, d_k, d_v, total_k_SH, total_v_SH = rest
  m, index_k, step = (pl.program_id(axis) for axis in (1, 2, 3))
  first, last = plan.query_blocks(index_k, offset[0], window[m])

  @pl.when(step == 0)
  def _():
    total_k_SH[...] = jnp.zeros_like(total_k_SH)
    total_v_SH[...] = jnp.zeros_like(total_v_SH)

  @pl.when(first + step <= last)
  def _():
    q_RH, d_out_RH = _flat(q), _flat(d_out)
    lead = offset[0] + (first + step) * plan.rows - index_k * plan.keys
    logits_SR = _logits_SR(k[...], q_RH, segment_k[...], segment_q[...], slope[m], lead, plan.rows)
    arrays = q_RH, k[...], v[...], d_out_RH, logits_SR, log_denominator[...], correction[...]
    weights_SR, d_logits_SR = _weights_and_logit_gradients(*arrays)
    total_k_SH[...] += _dot(d_logits_SR, q_RH, (1, 0))
    total_v_SH[...] += _dot(weights_SR, d_out_RH, (1, 0))

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    d_k[...] = total_k_SH[...].astype(d_k.dtype)
    d_v[...] = total_v_SH[...].astype(d_v.dtype)


class _Arrays(NamedTuple):
  """Inputs of the kernels, padded to whole blocks."""

  q: jax.Array  # [B, M, G, L, H]
  k: jax.Array  # [B, M, S, H]
  v: jax.Array
  segment_q: jax.Array  # [B, blocks, 1, R]: once for every head of a group
  segment_k: jax.Array  # [B, blocks, 1, S]


def _queries(x_BLNH, num_kv_heads: int, plan: _Plan):
  return pad_length(rearrange(x_BLNH, "B L (M G) H -> B M G L H", M=num_kv_heads), plan.rows, 3)


def _per_row(x_BNL, num_kv_heads: int, plan: _Plan):
  """[B, N, L] -> [B, M, blocks, 1, R]."""
  x_BNL = pad_length(x_BNL, plan.rows, 2)
  return rearrange(x_BNL, "B (M G) (i l) -> B M i 1 (G l)", M=num_kv_heads, l=plan.rows)


def _arrays(q_BLNH, k_BSMH, v_BSMH, segment_BL, segment_BS, plan: _Plan) -> _Arrays:
  num_kv_heads = k_BSMH.shape[2]
  k, v = (pad_length(rearrange(x, "B S M H -> B M S H"), plan.keys, 2) for x in (k_BSMH, v_BSMH))
  # Padding keys stand after every query, and are of no query's document.
  segment_q, segment_k = pad_length(segment_BL, plan.rows, 1, -1), pad_length(segment_BS, plan.keys, 1, -2)
  heads = q_BLNH.shape[2] // num_kv_heads
  return _Arrays(
    _queries(q_BLNH, num_kv_heads, plan),
    k,
    v,
    repeat(segment_q, "B (i l) -> B i 1 (G l)", l=plan.rows, G=heads),
    rearrange(segment_k, "B (j s) -> B j 1 s", s=plan.keys),
  )


def _by_steps(plan: _Plan, window_M: Sequence[int | None], slope_M, offset, run: Callable) -> list[jax.Array]:
  """Calls `run` for each set of groups with as many steps, and joins its results, whose axis 1 is the groups."""
  steps_M = [plan.steps(window) for window in window_M]
  sets = [[m for m, other in enumerate(steps_M) if other == steps] for steps in dict.fromkeys(steps_M)]
  parts = []
  for groups in sets:
    window = jnp.asarray([_EVERYTHING if window_M[m] is None else window_M[m] for m in groups], jnp.int32)
    group = jnp.asarray(groups, jnp.int32)
    scalars = _Scalars(offset.reshape(1), group, jnp.minimum(window, _EVERYTHING), slope_M[np.array(groups)])
    parts.append(run(scalars, *steps_M[groups[0]]))
  order = np.concatenate(sets)
  joined = [jnp.concatenate(part, axis=1) if len(sets) > 1 else part[0] for part in zip(*parts, strict=True)]
  return joined if (np.diff(order) > 0).all() else [x[:, np.argsort(order)] for x in joined]


def _call(kernel, plan: _Plan, scalars: _Scalars, grid, inputs, in_specs, out_shapes, out_specs, scratch):
  specs = dict(in_specs=list(in_specs), out_specs=list(out_specs))
  grid_spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(scalars), grid=grid, scratch_shapes=scratch, **specs)
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid_spec=grid_spec,
    out_shape=list(out_shapes),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
    interpret=INTERPRET,
  )(*scalars, *inputs)


def _specs(arrays: _Arrays, block_q: Callable, block_k: Callable):
  """BlockSpecs of the arrays, and of what belongs to rows; block_q and block_k: of a grid index, the blocks to read."""
  _, _, heads, _, width = arrays.q.shape
  num_rows, keys = arrays.segment_q.shape[-1], arrays.segment_k.shape[-1]

  def group(at):
    return at[5][at[1]]  # the grid's m-th group, among all

  q = pl.BlockSpec((None, None, heads, num_rows // heads, width), lambda *at: (at[0], group(at), 0, block_q(at), 0))
  k = pl.BlockSpec((None, None, keys, width), lambda *at: (at[0], group(at), block_k(at), 0))
  segment_q = pl.BlockSpec((None, None, 1, num_rows), lambda *at: (at[0], block_q(at), 0, 0))
  segment_k = pl.BlockSpec((None, None, 1, keys), lambda *at: (at[0], block_k(at), 0, 0))
  row = pl.BlockSpec((None, None, None, 1, num_rows), lambda *at: (at[0], group(at), block_q(at), 0, 0))
  return _Arrays(q, k, k, segment_q, segment_k), row


def _specs_by_queries(arrays: _Arrays, plan: _Plan):
  """As `_specs`, for a grid [B, M, blocks of queries, steps]: the arrays, what belongs to rows, and both as outputs."""

  def block_k(at):
    first, last = plan.key_blocks(at[2], at[4][0], at[6][at[1]])
    return jnp.minimum(first + at[3], last)

  specs, row = _specs(arrays, lambda at: at[2], block_k)
  out = pl.BlockSpec(specs.q.block_shape, lambda *at: (at[0], at[1], 0, at[2], 0))
  return specs, row, out, pl.BlockSpec(row.block_shape, lambda *at: (at[0], at[1], at[2], 0, 0))


def _specs_by_keys(arrays: _Arrays, plan: _Plan):
  """As `_specs`, for a grid [B, M, blocks of keys, steps]: the arrays, what belongs to rows, and keys as outputs."""

  def block_q(at):
    first, last = plan.query_blocks(at[2], at[4][0], at[6][at[1]])
    return jnp.clip(first + at[3], 0, jnp.maximum(last, 0))

  specs, row = _specs(arrays, block_q, lambda at: at[2])
  return specs, row, pl.BlockSpec(specs.k.block_shape, lambda *at: (at[0], at[1], at[2], 0))


def tpu_forward(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset, *, window_M: Sequence[int | None]):
  """As `blocked_attention.blocked_forward`."""
  (batch, length, num_heads, width), num_kv_heads = q_BLNH.shape, k_BSMH.shape[2]
  plan = _plan(length, k_BSMH.shape[1], num_heads // num_kv_heads)
  arrays = _arrays(q_BLNH, k_BSMH, v_BSMH, segment_BL, segment_BS, plan)
  specs, _, out_spec, row_spec = _specs_by_queries(arrays, plan)
  num_rows = arrays.segment_q.shape[-1]

  def run(scalars, steps, _):
    groups = scalars.group.size
    shapes = (
      jax.ShapeDtypeStruct((batch, groups, *arrays.q.shape[2:]), q_BLNH.dtype),
      jax.ShapeDtypeStruct((batch, groups, plan.num_query_blocks, 1, num_rows), jnp.float32),
    )
    grid = (batch, groups, plan.num_query_blocks, steps)
    scratch = [pltpu.VMEM((n, num_rows), jnp.float32) for n in (width, 1, 1)]
    return _call(_forward_kernel, plan, scalars, grid, arrays, specs, shapes, (out_spec, row_spec), scratch)

  out, log_denominator = _by_steps(plan, window_M, slope_M, offset, run)
  log_denominator_BNL = rearrange(log_denominator, "B M i 1 (G l) -> B (M G) (i l)", l=plan.rows)[:, :, :length]
  return rearrange(out[:, :, :, :length], "B M G L H -> B L (M G) H"), log_denominator_BNL


def tpu_backward(
  q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset, out_BLNH, log_denominator_BNL, d_out_BLNH,
  *, window_M: Sequence[int | None],
):  # fmt: skip
  """As `blocked_attention.blocked_backward`."""
  (batch, length, num_heads, width), (num_keys, num_kv_heads) = q_BLNH.shape, k_BSMH.shape[1:3]
  plan = _plan(length, num_keys, num_heads // num_kv_heads)
  arrays = _arrays(q_BLNH, k_BSMH, v_BSMH, segment_BL, segment_BS, plan)
  # Row sums of d_weights * weights: the softmax's own correction (FlashAttention, section 3.1).
  correction_BNL = jnp.einsum("BLNH,BLNH->BNL", *(x.astype(jnp.float32) for x in (d_out_BLNH, out_BLNH)))
  rows = [_per_row(x, num_kv_heads, plan) for x in (log_denominator_BNL, correction_BNL)]
  inputs = (*arrays, *rows, _queries(d_out_BLNH, num_kv_heads, plan))

  def queries(scalars, steps, _):
    specs, row, out, _ = _specs_by_queries(arrays, plan)
    shape = jax.ShapeDtypeStruct((batch, scalars.group.size, *arrays.q.shape[2:]), q_BLNH.dtype)
    scratch = [pltpu.VMEM((width, arrays.segment_q.shape[-1]), jnp.float32)]
    grid = (batch, scalars.group.size, plan.num_query_blocks, steps)
    return _call(_queries_kernel, plan, scalars, grid, inputs, (*specs, row, row, specs.q), (shape,), (out,), scratch)

  def keys(scalars, _, steps):
    specs, row, out = _specs_by_keys(arrays, plan)
    shapes = [jax.ShapeDtypeStruct((batch, scalars.group.size, *x.shape[2:]), x.dtype) for x in (arrays.k, arrays.v)]
    scratch = [pltpu.VMEM((plan.keys, width), jnp.float32)] * 2
    grid = (batch, scalars.group.size, plan.num_key_blocks, steps)
    return _call(_keys_kernel, plan, scalars, grid, inputs, (*specs, row, row, specs.q), shapes, (out, out), scratch)

  (d_q,) = _by_steps(plan, window_M, slope_M, offset, queries)
  d_keys_values = _by_steps(plan, window_M, slope_M, offset, keys)
  d_k_BSMH, d_v_BSMH = (rearrange(d[:, :, :num_keys], "B M S H -> B S M H") for d in d_keys_values)
  return rearrange(d_q[:, :, :, :length], "B M G L H -> B L (M G) H"), d_k_BSMH, d_v_BSMH
