"""Experts on CPU by the kernel in `cpu/experts.cc`: sort, gather, SwiGLU, gates and combination in one call."""

import jax

from moe_lab.ops import native
from moe_lab.ops.grouped_mlp import ExpertWeights


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
