"""Moves tokens to their experts and back.

`dense` computes every expert on every token: the reference. The other two
begin with one sort that puts the (token, slot) pairs in use in order of their
experts: `capacity` gives each expert a fixed number of rows and drops what
does not fit; `ragged` computes exactly the rows in use, drops nothing, and has
room for every slot of every token, so its shapes never change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.ops.grouped_mlp import ExpertWeights, grouped_mlp, swiglu
from moe_lab.ops.tiled_experts import tile_sizes, tiled_experts
from moe_lab.routing.base import Assignment


class SortedRows(NamedTuple):
  """The pairs in use, in order of their experts and then of their tokens; R = T * K.

  Attributes:
    pair_R: int32, token * K + slot of each row; the pairs not in use come last.
    rows_E: int32, rows of each expert.
  """

  pair_R: jax.Array
  rows_E: jax.Array


class RowLayout(NamedTuple):
  """Where each (token, slot) stands in a buffer of rows, and back.

  Attributes:
    row_TK: int32; the number of rows where the slot is unused or dropped.
    token_R: int32; T where the row is empty.
  """

  row_TK: jax.Array
  token_R: jax.Array


def sort_rows(assignment: Assignment, num_experts: int) -> SortedRows:
  """Sorts the pairs by expert; those not valid go to the end."""
  expert_R = jnp.where(assignment.valid_TK, assignment.expert_TK, num_experts).reshape(-1)
  pairs = expert_R.size
  rows_E = jnp.bincount(expert_R, length=num_experts).astype(jnp.int32)
  if (num_experts + 1) * pairs < 2**32:
    # Expert and pair in one number: a plain sort of it takes a third of a stable sort of two arrays.
    key_R = expert_R.astype(jnp.uint32) * pairs + jnp.arange(pairs, dtype=jnp.uint32)
    pair_R = (jax.lax.sort(key_R, is_stable=False) % pairs).astype(jnp.int32)
  else:
    pair_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
  return SortedRows(pair_R, rows_E)


# The two movements are each other's transpose. Spelt out, both directions are
# gathers; left to autodiff, one of them would be a scatter-add, in no fixed
# order on GPU.


@jax.custom_vjp
def _to_rows(x_TD, layout: RowLayout):
  """x_RD: each row its token's value, zeros where empty."""
  return x_TD.at[layout.token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _to_tokens(y_RD, layout: RowLayout):
  """y_TD: each token the sum of its rows."""
  return sum(y_RD.at[layout.row_TK[:, slot]].get(mode="fill", fill_value=0) for slot in range(layout.row_TK.shape[1]))


_to_rows.defvjp(lambda x, layout: (_to_rows(x, layout), layout), lambda layout, dy: (_to_tokens(dy, layout), None))
_to_tokens.defvjp(lambda y, layout: (_to_tokens(y, layout), layout), lambda layout, dx: (_to_rows(dx, layout), None))


def _lay_out(pair_R, used_R, num_tokens: int, slots: int) -> RowLayout:
  """The layout of rows that hold the given pairs, where used."""
  row_TK = jnp.full(num_tokens * slots, pair_R.size, jnp.int32)
  row_TK = row_TK.at[jnp.where(used_R, pair_R, row_TK.size)].set(jnp.arange(pair_R.size), mode="drop")
  return RowLayout(row_TK.reshape(num_tokens, slots), jnp.where(used_R, pair_R // slots, num_tokens))


def _gate_of_row(gate_TK, pair_R, used_R):
  # Rows that are not used must not share a pair with one that is: the gradient adds without order.
  pair_R = jnp.where(used_R, pair_R, gate_TK.size + jnp.arange(pair_R.size))
  return gate_TK.reshape(-1).at[pair_R].get(mode="fill", fill_value=0, unique_indices=True)


def _dense(x_TD, assignment: Assignment, weights: ExpertWeights):
  y_ETD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x_TD, *weights)
  one_hot_TKE = jax.nn.one_hot(assignment.expert_TK, y_ETD.shape[0])
  gate_TE = jnp.einsum("TK,TKE->TE", jnp.where(assignment.valid_TK, assignment.gate_TK, 0), one_hot_TKE)
  return jnp.einsum("ETD,TE->TD", y_ETD, gate_TE.astype(x_TD.dtype)), jnp.zeros(())


def _capacity(x_TD, assignment: Assignment, weights: ExpertWeights, capacity: int):
  num_experts = weights.gate_EDF.shape[0]
  pair_R, rows_E = sort_rows(assignment, num_experts)
  rank_EC = jnp.broadcast_to(jnp.arange(capacity), (num_experts, capacity))
  used_R = (rank_EC < rows_E[:, None]).reshape(-1)
  place_EC = (jnp.cumsum(rows_E) - rows_E)[:, None] + rank_EC
  pair_R = pair_R.at[place_EC.reshape(-1)].get(mode="clip")
  layout = _lay_out(pair_R, used_R, *assignment.expert_TK.shape)
  y_ECD = jax.vmap(swiglu)(_to_rows(x_TD, layout).reshape(num_experts, capacity, -1), *weights)
  gate_R1 = _gate_of_row(assignment.gate_TK, pair_R, used_R)[:, None].astype(x_TD.dtype)
  y_TD = _to_tokens(y_ECD.reshape(num_experts * capacity, -1) * gate_R1, layout)
  return y_TD, jnp.maximum(rows_E - capacity, 0).sum().astype(jnp.float32)


def _ragged(x_TD, assignment: Assignment, weights: ExpertWeights, experts: str, tiles: tuple[int, ...] | None):
  num_experts = weights.gate_EDF.shape[0]
  num_tokens, slots = assignment.expert_TK.shape
  pair_R, rows_E = sort_rows(assignment, num_experts)
  used_R = jnp.arange(pair_R.size) < rows_E.sum()
  gate_R = _gate_of_row(assignment.gate_TK, pair_R, used_R)
  if experts == "auto":
    experts = "tiles" if jax.default_backend() == "cpu" else "ragged_dot"
  if experts == "tiles":
    tiles = tiles or tile_sizes(pair_R.size / num_experts)
    return tiled_experts(x_TD, weights, gate_R, pair_R // slots, rows_E, tiles), jnp.zeros(())
  layout = _lay_out(pair_R, used_R, num_tokens, slots)
  y_RD = grouped_mlp(_to_rows(x_TD, layout), weights, rows_E, backend=experts)
  # Rows beyond the groups are undefined: select, since nothing times NaN is still NaN.
  y_RD = jnp.where(used_R[:, None], y_RD * gate_R[:, None].astype(x_TD.dtype), 0)
  return _to_tokens(y_RD, layout), jnp.zeros(())


def dispatch(
  x_TD: jax.Array,
  assignment: Assignment,
  weights: ExpertWeights,
  *,
  backend: str = "auto",
  capacity: int | None = None,
  experts: str = "auto",
  tiles: tuple[int, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs each token through its experts and sums the gated results.

  Args:
    x_TD: hidden states.
    assignment: the experts of each token.
    weights: of all experts; cast to the hidden states' type.
    backend: dense | capacity | ragged | auto (ragged).
    capacity: C, rows per expert; `capacity` only. Later tokens are dropped first.
    experts: what computes the rows of `ragged`: tiles (CPU) | ragged_dot (GPU, TPU) | reference | auto.
    tiles: see `tiled_experts`; by default `tile_sizes`.

  Returns:
    y_TD in the hidden states' type, and the number of dropped rows (float32 []).
  """
  weights = ExpertWeights(*(w.astype(x_TD.dtype) for w in weights))
  if backend == "dense":
    return _dense(x_TD, assignment, weights)
  if backend == "capacity":
    return _capacity(x_TD, assignment, weights, capacity)
  if backend in ("auto", "ragged"):
    return _ragged(x_TD, assignment, weights, experts, tiles)
  raise ValueError(f"dispatch {backend!r}: wanted auto, dense, capacity or ragged")
