"""Experts on CPU by the kernel in `cpu/experts.cc`: sort, gather, SwiGLU, gates and combination in one call."""

import jax
import jax.numpy as jnp

from moe_lab.ops import native
from moe_lab.ops.grouped_mlp import ExpertWeights, num_experts_of
from moe_lab.ops.quantised import BOOKS, SCALE_TYPE, scales_of
from moe_lab.ops.rows import gate_of_row, sort_by_expert
from moe_lab.ops.tiled_experts import tile_sizes, tiled_experts


@jax.custom_vjp
def native_experts(x_TD: jax.Array, weights: ExpertWeights, gate_TK: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """Returns y_TD: the gated outputs of each token's experts, in the hidden states' type, computed in float32.

  Args:
    x_TD: hidden states.
    weights: of all experts, in the hidden states' type.
    gate_TK: float32.
    expert_TK: int32; E where the slot is not in use.

  Raises:
    RunError: the kernels can't be built here.
  """
  native.register()
  (y_TD,) = native.call("experts_forward", [x_TD.shape], x_TD, *weights, expert_TK, gate_TK)
  return y_TD.astype(x_TD.dtype)


def _forward(x_TD, weights, gate_TK, expert_TK):
  return native_experts(x_TD, weights, gate_TK, expert_TK), (x_TD, weights, gate_TK, expert_TK)


def _backward(saved, dy_TD):
  x_TD, weights, gate_TK, expert_TK = saved
  shapes = [a.shape for a in (x_TD, *weights, gate_TK)]
  gradients = native.call("experts_backward", shapes, x_TD, *weights, expert_TK, gate_TK, dy_TD)
  dx_TD, *d_weights, d_gate_TK = gradients
  d_weights = ExpertWeights(*(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True)))
  return dx_TD.astype(x_TD.dtype), d_weights, d_gate_TK, None


native_experts.defvjp(_forward, _backward)


@jax.custom_vjp
def native_coded_experts(
  x_TD: jax.Array, weights: ExpertWeights, gate_TK: jax.Array, expert_TK: jax.Array
) -> jax.Array:
  """As `native_experts`, of weights in 4 bits, which have no gradient: only experts that have rows are unpacked."""
  native.register()
  byte = jnp.arange(256, dtype=jnp.uint8)
  tables = jnp.asarray(BOOKS[weights.gate_EDF.book]), scales_of(jax.lax.bitcast_convert_type(byte, SCALE_TYPE))
  parts = [part for w in weights for part in (w.codes, jax.lax.bitcast_convert_type(w.scale, jnp.uint8))]
  (y_TD,) = native.call("experts_forward_coded", [x_TD.shape], x_TD, *parts, *tables, expert_TK, gate_TK)
  return y_TD.astype(x_TD.dtype)


def _coded_forward(x_TD, weights, gate_TK, expert_TK):
  return native_coded_experts(x_TD, weights, gate_TK, expert_TK), (x_TD, weights, gate_TK, expert_TK)


def _coded_backward(saved, dy_TD):
  x_TD, weights, gate_TK, expert_TK = saved
  num_experts, slots = num_experts_of(weights), gate_TK.shape[1]

  def by_tiles(x_TD, gate_TK):
    pair_R, rows_E = sort_by_expert(expert_TK.reshape(-1), num_experts)
    gate_R = gate_of_row(gate_TK, pair_R, jnp.arange(pair_R.size) < rows_E.sum())
    return tiled_experts(x_TD, weights, gate_R, pair_R // slots, rows_E, tile_sizes(pair_R.size / num_experts))

  dx_TD, d_gate_TK = jax.vjp(by_tiles, x_TD, gate_TK)[1](dy_TD)
  return dx_TD, None, d_gate_TK, None


native_coded_experts.defvjp(_coded_forward, _coded_backward)
