"""Moves tokens to their experts and back.

`dense` computes every expert on every token: the reference. The other two
lay the (token, expert) rows out by expert and differ only in where an
expert's rows begin: `capacity` gives each a fixed number of rows and drops
what does not fit; `ragged` packs them in tiles, drops nothing, and computes
only the tiles in use.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.ops.grouped_mlp import ExpertWeights, grouped_mlp, swiglu
from moe_lab.ops.tiled_experts import tiled_experts
from moe_lab.routing.base import Assignment


class RowLayout(NamedTuple):
  """Where each (token, slot) stands in the buffer of R rows, and back.

  Attributes:
    row_TK: int32; R where the slot is unused or dropped.
    token_R: int32; T where the row is empty.
    slot_R: int32, the slot of the row's token; 0 where empty.
  """

  row_TK: jax.Array
  token_R: jax.Array
  slot_R: jax.Array


def _rank_in_expert(assignment: Assignment, num_experts: int):
  """Numbers the valid rows of each expert by token; returns rank_TK and rows_E."""
  expert_X = jnp.where(assignment.valid_TK, assignment.expert_TK, num_experts).reshape(-1)
  taken_XE = jax.nn.one_hot(expert_X, num_experts, dtype=jnp.int32)
  before_XE = jnp.cumsum(taken_XE, axis=0) - taken_XE
  return (before_XE * taken_XE).sum(-1).reshape(assignment.expert_TK.shape), taken_XE.sum(0)


def _lay_out(assignment: Assignment, rank_TK, kept_TK, start_E, num_rows: int) -> RowLayout:
  num_tokens, slots = assignment.expert_TK.shape
  row_TK = jnp.where(kept_TK, start_E[assignment.expert_TK] + rank_TK, num_rows)
  token_TK, slot_TK = jnp.indices((num_tokens, slots), dtype=jnp.int32)
  flat = row_TK.reshape(-1)
  token_R = jnp.full(num_rows, num_tokens, jnp.int32).at[flat].set(token_TK.reshape(-1), mode="drop")
  slot_R = jnp.zeros(num_rows, jnp.int32).at[flat].set(slot_TK.reshape(-1), mode="drop")
  return RowLayout(row_TK, token_R, slot_R)


# The two movements are each other's transpose. Spelt out, both directions are
# gathers; left to autodiff, one of them would be a scatter-add, slow on CPU and
# in no fixed order on GPU.


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


def _gate_of_row(gate_TK, layout: RowLayout):
  return gate_TK.at[layout.token_R, layout.slot_R].get(mode="fill", fill_value=0)


def _dense(x_TD, assignment: Assignment, weights: ExpertWeights):
  y_ETD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x_TD, *weights)
  one_hot_TKE = jax.nn.one_hot(assignment.expert_TK, y_ETD.shape[0])
  gate_TE = jnp.einsum("TK,TKE->TE", jnp.where(assignment.valid_TK, assignment.gate_TK, 0), one_hot_TKE)
  return jnp.einsum("ETD,TE->TD", y_ETD, gate_TE.astype(x_TD.dtype)), jnp.zeros(())


def _capacity(x_TD, assignment: Assignment, weights: ExpertWeights, capacity: int):
  num_experts = weights.gate_EDF.shape[0]
  rank_TK, _ = _rank_in_expert(assignment, num_experts)
  kept_TK = assignment.valid_TK & (rank_TK < capacity)
  layout = _lay_out(assignment, rank_TK, kept_TK, jnp.arange(num_experts) * capacity, num_experts * capacity)
  y_ECD = jax.vmap(swiglu)(_to_rows(x_TD, layout).reshape(num_experts, capacity, -1), *weights)
  y_RD = y_ECD.reshape(num_experts * capacity, -1) * _gate_of_row(assignment.gate_TK, layout)[:, None].astype(
    x_TD.dtype
  )
  return _to_tokens(y_RD, layout), (assignment.valid_TK.sum() - kept_TK.sum()).astype(jnp.float32)


def _ragged(x_TD, assignment: Assignment, weights: ExpertWeights, tile: int, experts: str):
  num_experts = weights.gate_EDF.shape[0]
  rank_TK, rows_E = _rank_in_expert(assignment, num_experts)
  group_sizes_E = -(-rows_E // tile) * tile
  # The worst case: all slots used, every expert's last tile all but empty.
  slots_in_use = assignment.expert_TK.size
  num_rows = (math.ceil(slots_in_use / tile) + min(num_experts, slots_in_use)) * tile
  layout = _lay_out(assignment, rank_TK, assignment.valid_TK, jnp.cumsum(group_sizes_E) - group_sizes_E, num_rows)
  gate_R = _gate_of_row(assignment.gate_TK, layout)
  if experts == "auto":
    experts = "tiles" if jax.default_backend() == "cpu" else "ragged_dot"
  if experts == "tiles":
    y_TD = tiled_experts(x_TD, weights, gate_R, layout.token_R, layout.row_TK, group_sizes_E, tile)
  else:
    y_RD = grouped_mlp(_to_rows(x_TD, layout), weights, group_sizes_E, backend=experts)
    # Rows beyond the groups are undefined: select, since nothing times NaN is still NaN.
    in_use_R1 = layout.token_R[:, None] < x_TD.shape[0]
    y_TD = _to_tokens(jnp.where(in_use_R1, y_RD * gate_R[:, None].astype(x_TD.dtype), 0), layout)
  return y_TD, jnp.zeros(())


def dispatch(
  x_TD: jax.Array,
  assignment: Assignment,
  weights: ExpertWeights,
  *,
  backend: str = "auto",
  capacity: int | None = None,
  tile: int | None = None,
  experts: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Runs each token through its experts and sums the gated results.

  Args:
    x_TD: hidden states.
    assignment: the experts of each token.
    weights: of all experts; cast to the hidden states' type.
    backend: dense | capacity | ragged | auto (ragged).
    capacity: C, rows per expert; `capacity` only. Later tokens are dropped first.
    tile: rows per tile; `ragged` only. By default `default_tile`.
    experts: what computes the rows of `ragged`: tiles (CPU) | ragged_dot (GPU, TPU) | reference | auto.

  Returns:
    y_TD in the hidden states' type, and the number of dropped rows (float32 []).
  """
  weights = ExpertWeights(*(w.astype(x_TD.dtype) for w in weights))
  if backend == "dense":
    return _dense(x_TD, assignment, weights)
  if backend == "capacity":
    return _capacity(x_TD, assignment, weights, capacity)
  if backend in ("auto", "ragged"):
    tile = tile or default_tile(x_TD.shape[0], weights.gate_EDF.shape[0])
    return _ragged(x_TD, assignment, weights, tile, experts)
  raise ValueError(f"dispatch {backend!r}: wanted auto, dense, capacity or ragged")


def default_tile(num_tokens: int, num_experts: int) -> int:
  """A power of two in 8..128, about half an even share of the tokens.

  Larger tiles run nearer to the peak; half-empty ones waste what they gain.
  """
  return int(min(128, max(8, 2 ** math.floor(math.log2(max(1, num_tokens / num_experts / 2))))))
