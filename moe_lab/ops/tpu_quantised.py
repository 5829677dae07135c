"""A TPU kernel that multiplies sorted rows with experts' matrices in 4 bits, read as they are.

It works on whole tiles of rows, each of one expert: rows are spread out so that every expert's begin a tile. A tile is
multiplied by blocks of its expert's matrix, which are unpacked where they are used. The halves of each group of codes
(`quantised.py`) meet the columns of `x` that belong to them, so nothing is interleaved.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_lab.ops.quantised import BOOKS, GROUP, UNIT, Quantised

HALF = GROUP // 2
ROWS = 128  # of a tile, at most; a step of decoding has few rows for each expert
DEPTH, WIDTH = 512, 512  # of a block of the matrix


def _value(code: jax.Array, book: str) -> jax.Array:
  """Returns float32 values of int32 codes without a look-up, which the kernel has not."""
  if book == "int4":
    return (code - 8).astype(jnp.float32)
  value = jnp.full(code.shape, BOOKS[book][0], jnp.float32)
  for number, step in enumerate(BOOKS[book][1:], 1):
    value = jnp.where(code >= number, step, value)
  return value


def _scale(byte: jax.Array) -> jax.Array:
  """Returns float32 of float8 (e4m3) bits in int32: older chips have no such type."""
  exponent, fraction = (byte >> 3) & 15, byte & 7
  normal = jax.lax.bitcast_convert_type(((exponent + 120) << 23) | (fraction << 20), jnp.float32)
  size = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0**-9, normal)
  return jnp.where(byte >= 128, -size, size) * UNIT


def _kernel(expert_of_tile, used_tiles, low_ref, high_ref, codes_ref, scale_ref, y_ref, sum_ref, *, book: str):
  del expert_of_tile
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(pl.program_id(0) < used_tiles[0])
  def _():
    byte = codes_ref[0].astype(jnp.int32)
    scale = _scale(scale_ref[0].astype(jnp.int32))
    groups, width = scale.shape
    scale = jnp.broadcast_to(scale[:, None], (groups, HALF, width)).reshape(groups * HALF, width)
    for x_ref, code in ((low_ref, byte & 15), (high_ref, byte >> 4)):
      w = (_value(code, book) * scale).astype(x_ref.dtype)
      precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
      sum_ref[...] += jax.lax.dot(x_ref[...], w, precision=precision, preferred_element_type=jnp.float32)

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = sum_ref[...]


def _block(size: int, most: int, step: int) -> int:
  """Returns the largest multiple of `step` up to `most` that divides `size`; the whole if there is none."""
  return next((block for block in range(most, 0, -step) if size % block == 0), size)


def tpu_quantised_dot(
  x_RD: jax.Array, q_EDF: Quantised, group_sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """Returns float32 [R, F]: each row times the matrix of its group; rows beyond the groups are undefined.

  Args:
    x_RD: sorted by group.
    q_EDF: contracted along its second dimension.
    group_sizes_E: int32, rows of each group.
    interpret: run the kernel as it is written, on whatever machine this is.
  """
  rows, experts = x_RD.shape[0], q_EDF.codes.shape[0]
  half, width = q_EDF.codes.shape[1:]
  x_RD = jnp.pad(x_RD, ((0, 0), (0, 2 * half - x_RD.shape[1])))  # the last group may reach beyond D
  low, high = (part.reshape(rows, half) for part in jnp.split(x_RD.reshape(rows, -1, 2, HALF), 2, axis=2))

  tile = next((size for size in (8, 16, 32, 64) if size * experts >= rows), ROWS)
  num_tiles = -(-rows // tile) + experts
  tiles_E = -(-group_sizes_E // tile)
  end_E, first_E = jnp.cumsum(tiles_E), jnp.cumsum(group_sizes_E) - group_sizes_E
  used = end_E[-1:]
  # Tiles that are not used stay with the last one's expert, so that no block is fetched for them.
  tile_T = jnp.minimum(jnp.arange(num_tiles), jnp.maximum(used - 1, 0))
  expert_T = jnp.searchsorted(end_E, tile_T, side="right").clip(0, experts - 1).astype(jnp.int32)
  begin_E = (end_E - tiles_E) * tile  # place of each expert's first row
  place_S = jnp.arange(num_tiles * tile)
  expert_S = expert_T.repeat(tile)
  within_S = place_S - begin_E[expert_S]
  row_S = jnp.where(within_S < group_sizes_E[expert_S], first_E[expert_S] + within_S, rows)
  low, high = (part.at[row_S].get(mode="fill", fill_value=0) for part in (low, high))

  deep, wide = _block(half, DEPTH // 2, DEPTH // 2), _block(width, WIDTH, 128)
  x_spec = pl.BlockSpec((tile, deep), lambda t, f, d, expert, used: (t, d))

  def of_expert(size):
    return pl.BlockSpec((1, size, wide), lambda t, f, d, expert, used: (expert[t], d, f))

  y_SF = pl.pallas_call(
    functools.partial(_kernel, book=q_EDF.book),
    out_shape=jax.ShapeDtypeStruct((num_tiles * tile, width), jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(num_tiles, width // wide, half // deep),
      in_specs=[x_spec, x_spec, of_expert(deep), of_expert(deep // HALF)],
      out_specs=pl.BlockSpec((tile, wide), lambda t, f, d, expert, used: (t, f)),
      scratch_shapes=[pltpu.VMEM((tile, wide), jnp.float32)],
    ),
    interpret=interpret,
  )(
    expert_T,
    used.astype(jnp.int32),
    low,
    high,
    q_EDF.codes,
    jax.lax.bitcast_convert_type(q_EDF.scale, jnp.uint8),
  )
  expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(rows), side="right").clip(0, experts - 1)
  return y_SF[begin_E[expert_R] + jnp.arange(rows) - first_E[expert_R]]
