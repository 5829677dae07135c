"""Moves tokens to their experts and back.

`dense` computes every expert on every token: the reference. The other two
begin with one sort that puts the (token, slot) pairs in use in order of their
experts: `capacity` gives each expert a fixed number of rows and drops what
does not fit; `ragged` computes exactly the rows in use, drops nothing, and has
room for every slot of every token, so its shapes never change.
"""

import jax
import jax.numpy as jnp

from moe_lab.ops import native
from moe_lab.ops.grouped_mlp import ExpertWeights, grouped_mlp, has_tokamax, num_experts_of, swiglu
from moe_lab.ops.native_experts import native_coded_experts, native_experts
from moe_lab.ops.quantised import Quantised, cast, unpacked
from moe_lab.ops.rows import SortedRows, cut, gate_of_row, lay_out, sort_by_expert, to_rows, to_tokens
from moe_lab.ops.tiled_experts import tile_sizes, tiled_experts
from moe_lab.routing.base import Assignment


def sort_rows(assignment: Assignment, num_experts: int) -> SortedRows:
  """Sorts the pairs by expert; those not valid go to the end."""
  return sort_by_expert(jnp.where(assignment.valid_TK, assignment.expert_TK, num_experts).reshape(-1), num_experts)


def _dense(x_TD, assignment: Assignment, weights: ExpertWeights):
  y_ETD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x_TD, *weights)
  one_hot_TKE = jax.nn.one_hot(assignment.expert_TK, y_ETD.shape[0])
  gate_TE = jnp.einsum("TK,TKE->TE", jnp.where(assignment.valid_TK, assignment.gate_TK, 0), one_hot_TKE)
  return jnp.einsum("ETD,TE->TD", y_ETD, gate_TE.astype(x_TD.dtype)), jnp.zeros(())


def _capacity(x_TD, assignment: Assignment, weights: ExpertWeights, capacity: int):
  num_experts = weights.gate_EDF.shape[0]
  pair_R, rows_E = sort_rows(assignment, num_experts)
  pair_R, used_R = cut(pair_R, rows_E, capacity)
  layout = lay_out(pair_R, used_R, *assignment.expert_TK.shape)
  y_ECD = jax.vmap(swiglu)(to_rows(x_TD, layout).reshape(num_experts, capacity, -1), *weights)
  gate_R1 = gate_of_row(assignment.gate_TK, pair_R, used_R)[:, None].astype(x_TD.dtype)
  y_TD = to_tokens(y_ECD.reshape(num_experts * capacity, -1) * gate_R1, layout)
  return y_TD, jnp.maximum(rows_E - capacity, 0).sum().astype(jnp.float32)


def experts_backend(choice: str, platform: str) -> str:
  """Returns what computes the rows of ragged dispatch where `choice` is auto, for the platform that it is compiled for.

  Not `jax.lax.platform_dependent`, at lowering: under a gradient each platform's branch would also return what the
  other one saves, filled with zeros and as large as the rows.
  """
  if choice != "auto":
    return choice
  if platform == "tpu":
    return "ragged_dot"
  if platform == "cpu":
    return "native" if native.available() else "tiles"
  return "tokamax" if has_tokamax() else "tiles"


def _ragged(x_TD, assignment: Assignment, weights: ExpertWeights, experts: str, tiles: tuple[int, ...] | None):
  num_experts = num_experts_of(weights)
  num_tokens, slots = assignment.expert_TK.shape
  if experts == "native":
    expert_TK = jnp.where(assignment.valid_TK, assignment.expert_TK, num_experts).astype(jnp.int32)
    run = native_coded_experts if isinstance(weights.gate_EDF, Quantised) else native_experts
    return run(x_TD, weights, assignment.gate_TK, expert_TK), jnp.zeros(())
  pair_R, rows_E = sort_rows(assignment, num_experts)
  used_R = jnp.arange(pair_R.size) < rows_E.sum()
  gate_R = gate_of_row(assignment.gate_TK, pair_R, used_R)
  if experts == "tiles":
    tiles = tiles or tile_sizes(pair_R.size / num_experts)
    return tiled_experts(x_TD, weights, gate_R, pair_R // slots, rows_E, tiles), jnp.zeros(())
  layout = lay_out(pair_R, used_R, num_tokens, slots)
  y_RD = grouped_mlp(to_rows(x_TD, layout), weights, rows_E, backend=experts)
  # Rows beyond the groups are undefined: select, since nothing times NaN is still NaN.
  y_RD = jnp.where(used_R[:, None], y_RD * gate_R[:, None].astype(x_TD.dtype), 0)
  return to_tokens(y_RD, layout), jnp.zeros(())


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
    weights: of all experts; cast to the hidden states' type. Those in 4 bits are read as they are by ragged dispatch,
      and unpacked for the others.
    backend: dense | capacity | ragged | auto (ragged).
    capacity: C, rows per expert; `capacity` only. Later tokens are dropped first.
    experts: what computes the rows of `ragged`: native (CPU) | tiles (CPU without a C++ compiler, GPU without tokamax)
      | ragged_dot (TPU) | tokamax (GPU) | reference | auto (`experts_backend` of the default device).
    tiles: see `tiled_experts`; by default `tile_sizes`.

  Returns:
    y_TD in the hidden states' type, and the number of dropped rows (float32 []).
  """
  if backend in ("dense", "capacity"):
    weights = ExpertWeights(*(unpacked(w, x_TD.dtype) for w in weights))
  else:
    weights = ExpertWeights(*(cast(w, x_TD.dtype) for w in weights))
  if backend == "dense":
    return _dense(x_TD, assignment, weights)
  if backend == "capacity":
    return _capacity(x_TD, assignment, weights, capacity)
  if backend in ("auto", "ragged"):
    return _ragged(x_TD, assignment, weights, experts_backend(experts, jax.default_backend()), tiles)
  raise ValueError(f"dispatch {backend!r}: wanted auto, dense, capacity or ragged")
