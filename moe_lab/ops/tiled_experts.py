"""Experts on CPU: gather, SwiGLU and gate in one loop over the tiles in use.

`jax.lax.ragged_dot` costs E times the work on CPU, and buffers for the worst
case (every slot used) cost memory traffic that the actual counts do not need.
Here each visited tile reads its tokens, computes, and writes its rows; what is
not in use is never touched. The loop's length depends on the data, so the
derivative is written out.
"""

import functools

import jax
import jax.numpy as jnp

from moe_lab.ops.grouped_mlp import ExpertWeights, expert_of_row

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _tiles(group_sizes_E, num_rows: int, tile: int):
  """The expert of each tile, and how many tiles are in use."""
  expert = expert_of_row(group_sizes_E // tile, num_rows // tile)
  # Unused tiles are never visited; the clip keeps their expert a legal index.
  return jnp.minimum(expert, group_sizes_E.shape[0] - 1), jnp.sum(group_sizes_E) // tile


def _rows(x, index, tile: int):
  return jax.lax.dynamic_slice_in_dim(x, index * tile, tile)


def _put(x, rows, index, tile: int):
  return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), index * tile, 0)


def _take(x_TD, token):
  return x_TD.at[token].get(mode="fill", fill_value=0)


def _sum_rows(y_RD, row_TK):
  """Each token the sum of its rows: a gather a slot, where a scatter-add would be slow."""
  return sum(_take(y_RD, row_TK[:, slot]) for slot in range(row_TK.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def tiled_experts(
  x_TD: jax.Array,
  weights: ExpertWeights,
  gate_R: jax.Array,
  token_R: jax.Array,
  row_TK: jax.Array,
  group_sizes_E: jax.Array,
  tile: int,
) -> jax.Array:
  """Returns y_TD: the gated outputs of each token's experts, summed.

  Args:
    x_TD: hidden states.
    weights: of all experts, in the hidden states' dtype.
    gate_R: float32, of each row.
    token_R: int32, the token of each row, T where a row is empty.
    row_TK: int32, the rows of each token, R where a slot is unused.
    group_sizes_E: int32, rows of each expert, multiples of `tile`; groups follow each other.
    tile: rows that share an expert.
  """
  expert_of_tile, num_tiles = _tiles(group_sizes_E, token_R.shape[0], tile)

  def visit(index, y_RD):
    gate, up, down = (w[expert_of_tile[index]] for w in weights)
    x = _take(x_TD, _rows(token_R, index, tile))
    hidden = jax.nn.silu(_dot("RD,DF->RF", x, gate)) * _dot("RD,DF->RF", x, up)
    y = _dot("RF,FD->RD", hidden.astype(x.dtype), down)
    return _put(y_RD, y * _rows(gate_R, index, tile)[:, None], index, tile)

  y_RD = jnp.zeros((token_R.shape[0], x_TD.shape[1]), x_TD.dtype)
  return _sum_rows(jax.lax.fori_loop(0, num_tiles, visit, y_RD), row_TK)


def _forward(x_TD, weights, gate_R, token_R, row_TK, group_sizes_E, tile):
  saved = (x_TD, weights, gate_R, token_R, row_TK, group_sizes_E)
  return tiled_experts(*saved, tile), saved


def _backward(tile, saved, dy_TD):
  # The hidden activations are recomputed: 2 of 11 products, against writing and
  # reading a buffer of the worst case's size.
  x_TD, weights, gate_R, token_R, row_TK, group_sizes_E = saved
  expert_of_tile, num_tiles = _tiles(group_sizes_E, token_R.shape[0], tile)

  def visit(index, carry):
    dx_RD, d_gate_R, d_weights = carry
    expert = expert_of_tile[index]
    w_gate, w_up, w_down = (w[expert] for w in weights)
    token, gate = _rows(token_R, index, tile), _rows(gate_R, index, tile)[:, None]
    x, dy = _take(x_TD, token), _take(dy_TD, token)
    pre, up = _dot("RD,DF->RF", x, w_gate), _dot("RD,DF->RF", x, w_up)
    sigmoid = jax.nn.sigmoid(pre)
    act = pre * sigmoid
    hidden = act * up
    # y = gate * (hidden down): its product with dy is d_gate, without computing y again.
    d_ungated = _dot("RD,FD->RF", dy, w_down)
    d_gate = jnp.sum(d_ungated * hidden, axis=1)
    d_hidden = d_ungated * gate
    d_up = (d_hidden * act).astype(x.dtype)
    d_pre = (d_hidden * up * (sigmoid + act * (1 - sigmoid))).astype(x.dtype)
    dx = _dot("RF,DF->RD", d_pre, w_gate) + _dot("RF,DF->RD", d_up, w_up)
    d_expert = (
      _dot("RD,RF->DF", x, d_pre),
      _dot("RD,RF->DF", x, d_up),
      _dot("RF,RD->FD", (hidden * gate).astype(x.dtype), dy),
    )
    d_weights = ExpertWeights(*(d.at[expert].add(one) for d, one in zip(d_weights, d_expert, strict=True)))
    return _put(dx_RD, dx, index, tile), _put(d_gate_R, d_gate, index, tile), d_weights

  start = (
    jnp.zeros((token_R.shape[0], x_TD.shape[1]), x_TD.dtype),
    jnp.zeros_like(gate_R),
    ExpertWeights(*(jnp.zeros(w.shape, jnp.float32) for w in weights)),
  )
  dx_RD, d_gate_R, d_weights = jax.lax.fori_loop(0, num_tiles, visit, start)
  d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
  return _sum_rows(dx_RD, row_TK), d_weights, d_gate_R, None, None, None


tiled_experts.defvjp(_forward, _backward)
