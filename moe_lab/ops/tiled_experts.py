"""Experts on CPU: gather, SwiGLU, gate and combine in one loop over the rows in use.

`jax.lax.ragged_dot` costs E times the work on CPU, and a buffer of every
token's every slot costs memory traffic that the actual counts do not need.
Here the experts are visited in turn; each takes its rows in large tiles, then
in smaller ones, so that dots are long and little is padding, and adds its
results to its tokens at once. Nothing as large as the rows is ever stored. The
loops' lengths depend on the data, so the derivative is written out.
"""

import functools

import jax
import jax.numpy as jnp

from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.ops.quantised import Quantised, matrix_of
from moe_lab.ops.row_sum import row_sum

# Rows a dot works on, largest first. Long dots run near the machine's peak, the
# smallest bounds the padding; each size is compiled, so at most three are used.
TILES = (512, 128, 32, 8)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def tile_sizes(mean_rows: float) -> tuple[int, ...]:
  """Returns those of `TILES` that are worth compiling where an expert has `mean_rows` on average."""
  return tuple(tile for tile in TILES if tile <= mean_rows)[:3] or TILES[-1:]


def _rows(x, start, size: int):
  return jax.lax.dynamic_slice_in_dim(x, start, size)


def _visit(num_rows, tiles: tuple[int, ...], body, carry):
  """Runs body(tile, first row, carry) over `num_rows` rows; only the last, smallest tile may reach beyond them."""
  done = 0
  for tile in tiles:
    left = num_rows - done
    # Not a switch over sizes: its branches would copy the accumulators, a loop updates them in place.
    visits = -(-left // tile) if tile == tiles[-1] else left // tile
    carry = jax.lax.fori_loop(
      0, visits, lambda i, carry, tile=tile, done=done: body(tile, done + i * tile, carry), carry
    )
    done = done + visits * tile
  return carry


def _gather(x_TD, token):
  return x_TD.at[token].get(mode="fill", fill_value=0)


def _in_and_out(weights: ExpertWeights, expert, dtype):
  """One expert's weights as two matrices: a dot of twice the width runs better than two."""
  gate_DF, up_DF, down_FD = (matrix_of(w, expert, dtype) for w in weights)
  return jnp.concatenate([gate_DF, up_DF], axis=1), down_FD


def _setup(token_R, gate_R, group_sizes_E, num_tokens: int, tiles: tuple[int, ...]):
  """Returns the experts that have rows first, their number, and the function that reads a tile's rows.

  Only those experts are visited: in decoding, reading an idle expert's weights would cost more than all else.
  """
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
  used_first_E = jnp.argsort(group_sizes_E == 0, stable=True)
  # A slice that would overrun the end would silently begin earlier.
  padded_token_R, padded_gate_R = (jnp.pad(a, (0, tiles[0])) for a in (token_R, gate_R))

  def read(expert, first, tile):
    """Returns the tile's first row, which rows are the expert's, their token (T if not) and gate (0 if not)."""
    inside, start = first + jnp.arange(tile) < group_sizes_E[expert], start_E[expert] + first
    token, gate = (_rows(a, start, tile) for a in (padded_token_R, padded_gate_R))
    return start, inside, jnp.where(inside, token, num_tokens), jnp.where(inside, gate, 0)[:, None]

  return used_first_E, jnp.sum(group_sizes_E > 0), read


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def tiled_experts(
  x_TD: jax.Array,
  weights: ExpertWeights,
  gate_R: jax.Array,
  token_R: jax.Array,
  group_sizes_E: jax.Array,
  tiles: tuple[int, ...],
) -> jax.Array:
  """Returns y_TD: the gated outputs of each token's experts, summed in float32.

  Args:
    x_TD: hidden states.
    weights: of all experts, in the hidden states' dtype; or in 4 bits, which have no gradient.
    gate_R: float32, of each row.
    token_R: int32, the token of each row.
    group_sizes_E: int32, rows of each expert; groups follow each other from row 0, unpadded.
    tiles: rows a dot works on, largest first (`tile_sizes`).
  """
  used_first_E, num_used, read = _setup(token_R, gate_R, group_sizes_E, x_TD.shape[0], tiles)

  def one_expert(index, y_TD):
    expert = used_first_E[index]
    w_in, w_out = _in_and_out(weights, expert, x_TD.dtype)

    def body(tile, first, y_TD):
      _, _, token, gate = read(expert, first, tile)
      x = _gather(x_TD, token)
      pre, up = jnp.split(_dot("RD,DF->RF", x, w_in), 2, axis=1)
      y = _dot("RF,FD->RD", (jax.nn.silu(pre) * up).astype(x.dtype), w_out)
      return y_TD.at[token].add(y * gate, mode="drop")

    return _visit(group_sizes_E[expert], tiles, body, y_TD)

  return jax.lax.fori_loop(0, num_used, one_expert, jnp.zeros(x_TD.shape, jnp.float32)).astype(x_TD.dtype)


def _forward(x_TD, weights, gate_R, token_R, group_sizes_E, tiles):
  saved = (x_TD, weights, gate_R, token_R, group_sizes_E)
  return tiled_experts(*saved, tiles), saved


def _backward(tiles, saved, dy_TD):
  # The hidden activations are recomputed, 2 of 11 products: writing and reading them measured slower.
  x_TD, weights, gate_R, token_R, group_sizes_E = saved
  used_first_E, num_used, read = _setup(token_R, gate_R, group_sizes_E, x_TD.shape[0], tiles)
  learning = not isinstance(weights.gate_EDF, Quantised)

  def one_expert(index, carry):
    dx_TD, d_gate_R, d_weights = carry
    expert = used_first_E[index]
    w_in, w_out = _in_and_out(weights, expert, x_TD.dtype)

    def body(tile, first, carry):
      dx_TD, d_gate_R, d_in, d_out = carry
      start, inside, token, gate = read(expert, first, tile)
      x, dy = _gather(x_TD, token), _gather(dy_TD, token)
      both = _dot("RD,DF->RF", x, w_in)
      # In turn: two dots at once share the cores and both run slower.
      both, dy = jax.lax.optimization_barrier((both, dy))
      pre, up = jnp.split(both, 2, axis=1)
      sigmoid = jax.nn.sigmoid(pre)
      act = pre * sigmoid
      hidden = act * up
      # y = gate * (hidden down): its product with dy is d_gate, without computing y again.
      d_ungated = _dot("RD,FD->RF", dy, w_out)
      d_gate = row_sum(d_ungated * hidden)
      d_hidden = d_ungated * gate
      d_both = jnp.concatenate([d_hidden * up * (sigmoid + act * (1 - sigmoid)), d_hidden * act], axis=1)
      d_both = d_both.astype(x.dtype)
      dx = _dot("RF,DF->RD", d_both, w_in)
      if learning:
        d_in += _dot("RD,RF->DF", x, d_both)
        d_out += _dot("RF,RD->FD", (hidden * gate).astype(x.dtype), dy)
      d_gate = jnp.where(inside, d_gate, _rows(d_gate_R, start, tile))
      d_gate_R = jax.lax.dynamic_update_slice_in_dim(d_gate_R, d_gate, start, 0)
      return dx_TD.at[token].add(dx, mode="drop"), d_gate_R, d_in, d_out

    zeros = (jnp.zeros(w_in.shape, jnp.float32), jnp.zeros(w_out.shape, jnp.float32))
    dx_TD, d_gate_R, d_in, d_out = _visit(group_sizes_E[expert], tiles, body, (dx_TD, d_gate_R, *zeros))
    if not learning:
      return dx_TD, d_gate_R, d_weights
    d_expert = ExpertWeights(*jnp.split(d_in, 2, axis=1), d_out)
    d_weights = jax.tree.map(lambda d, one: d.at[expert].set(one.astype(d.dtype)), d_weights, d_expert)
    return dx_TD, d_gate_R, d_weights

  start = (
    jnp.zeros(x_TD.shape, jnp.float32),
    jnp.zeros(gate_R.size + tiles[0]),
    jax.tree.map(jnp.zeros_like, weights) if learning else None,
  )
  dx_TD, d_gate_R, d_weights = jax.lax.fori_loop(0, num_used, one_expert, start)
  return dx_TD.astype(x_TD.dtype), d_weights, d_gate_R[: gate_R.size], None, None


tiled_experts.defvjp(_forward, _backward)
