"""SwiGLU experts over rows that are already sorted by expert.

Rows come in tiles of `tile` rows that belong to one expert; group sizes are
multiples of `tile`, and only the first sum(group_sizes) rows hold anything.
Rows beyond have undefined output. Back ends, equal in values and gradients:

  reference   every expert on every row, masked: the definition.
  tiles       a loop over the tiles in use: cost follows them. For CPU, where
              `ragged_dot` costs E times the work.
  ragged_dot  `jax.lax.ragged_dot`: for GPU and TPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ExpertWeights(NamedTuple):
  """SwiGLU weights (arXiv 2002.05202): (silu(x gate) * (x up)) down."""

  gate_EDF: jax.Array
  up_EDF: jax.Array
  down_EFD: jax.Array


def swiglu(x, gate, up, down):
  """One expert, [..., D] -> [..., D]; the hidden product is taken in float32."""
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  hidden = jax.nn.silu(dot("...D,DF->...F", x, gate)) * dot("...D,DF->...F", x, up)
  return dot("...F,FD->...D", hidden.astype(x.dtype), down).astype(x.dtype)


def _expert_of_row(group_sizes_E, num_rows: int):
  return jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(num_rows), side="right")


def _reference(x_RD, weights: ExpertWeights, group_sizes_E):
  y_ERD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x_RD, *weights)
  expert_R = _expert_of_row(group_sizes_E, x_RD.shape[0])
  return jnp.einsum("ERD,RE->RD", y_ERD, jax.nn.one_hot(expert_R, y_ERD.shape[0], dtype=x_RD.dtype))


def _ragged_dot(x_RD, weights: ExpertWeights, group_sizes_E):
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=group_sizes_E, preferred_element_type=jnp.float32)
  hidden = jax.nn.silu(dot(x_RD, weights.gate_EDF)) * dot(x_RD, weights.up_EDF)
  return dot(hidden.astype(x_RD.dtype), weights.down_EFD).astype(x_RD.dtype)


def _tile_layout(group_sizes_E, num_rows: int, tile: int):
  """The expert of each tile, and how many tiles are in use."""
  expert_of_tile = _expert_of_row(group_sizes_E // tile, num_rows // tile)
  # Unused tiles are never visited; the clip keeps their expert a legal index.
  return jnp.minimum(expert_of_tile, group_sizes_E.shape[0] - 1), jnp.sum(group_sizes_E) // tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiles(x_RD, weights: ExpertWeights, group_sizes_E, tile: int):
  expert_of_tile, num_tiles = _tile_layout(group_sizes_E, x_RD.shape[0], tile)

  def visit(index, y_RD):
    x = jax.lax.dynamic_slice_in_dim(x_RD, index * tile, tile)
    y = swiglu(x, *(w[expert_of_tile[index]] for w in weights))
    return jax.lax.dynamic_update_slice_in_dim(y_RD, y, index * tile, 0)

  return jax.lax.fori_loop(0, num_tiles, visit, jnp.zeros_like(x_RD))


def _tiles_forward(x_RD, weights, group_sizes_E, tile):
  return _tiles(x_RD, weights, group_sizes_E, tile), (x_RD, weights, group_sizes_E)


def _tiles_backward(tile, saved, dy_RD):
  # The hidden activations are recomputed: 2 of 11 matmuls, against writing and
  # reading a buffer of the worst case's size.
  x_RD, weights, group_sizes_E = saved
  expert_of_tile, num_tiles = _tile_layout(group_sizes_E, x_RD.shape[0], tile)

  def visit(index, carry):
    dx_RD, d_weights = carry
    expert = expert_of_tile[index]
    x, dy = (jax.lax.dynamic_slice_in_dim(a, index * tile, tile) for a in (x_RD, dy_RD))
    _, backward = jax.vjp(swiglu, x, *(w[expert] for w in weights))
    dx, *d_expert = backward(dy)
    d_weights = ExpertWeights(
      *(d.at[expert].add(one.astype(d.dtype)) for d, one in zip(d_weights, d_expert, strict=True))
    )
    return jax.lax.dynamic_update_slice_in_dim(dx_RD, dx, index * tile, 0), d_weights

  start = (jnp.zeros_like(x_RD), ExpertWeights(*(jnp.zeros(w.shape, jnp.float32) for w in weights)))
  dx_RD, d_weights = jax.lax.fori_loop(0, num_tiles, visit, start)
  return dx_RD, jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights), None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def grouped_mlp(
  x_RD: jax.Array, weights: ExpertWeights, group_sizes_E: jax.Array, *, tile: int, backend: str = "auto"
) -> jax.Array:
  """Applies expert e to its group of rows.

  Args:
    x_RD: rows, sorted by expert; R a multiple of `tile`.
    weights: of all experts, in the rows' dtype.
    group_sizes_E: int32, rows of each expert, multiples of `tile`, summing to at most R.
    tile: rows that are sure to share an expert.
    backend: reference | tiles | ragged_dot | auto (tiles on CPU, ragged_dot elsewhere).

  Returns:
    [R, D]; rows beyond sum(group_sizes_E) are undefined.
  """
  if backend == "auto":
    backend = "tiles" if jax.default_backend() == "cpu" else "ragged_dot"
  if backend == "reference":
    return _reference(x_RD, weights, group_sizes_E)
  if backend == "tiles":
    return _tiles(x_RD, weights, group_sizes_E, tile)
  if backend == "ragged_dot":
    return _ragged_dot(x_RD, weights, group_sizes_E)
  raise ValueError(f"grouped_mlp backend {backend!r}: wanted auto, reference, tiles or ragged_dot")
