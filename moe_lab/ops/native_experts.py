"""Experts on CPU by the kernel in `cpu/experts.cc`: sort, gather, SwiGLU, gates and combination in one call."""

import jax
import jax.numpy as jnp

from moe_lab.ops import native
from moe_lab.ops.grouped_mlp import ExpertWeights


def _like(*arrays):
  return [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in arrays]


def _float32(tree):
  return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


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
  (y_TD,) = native.call("experts_forward", *_like(x_TD))(*_float32((x_TD, *weights)), expert_TK, gate_TK)
  return y_TD.astype(x_TD.dtype)


def _forward(x_TD, weights, gate_TK, expert_TK):
  return native_experts(x_TD, weights, gate_TK, expert_TK), (x_TD, weights, gate_TK, expert_TK)


def _backward(saved, dy_TD):
  x_TD, weights, gate_TK, expert_TK = saved
  call = native.call("experts_backward", *_like(x_TD, *weights, gate_TK))
  dx_TD, *d_weights, d_gate_TK = call(*_float32((x_TD, *weights)), expert_TK, gate_TK, *_float32((dy_TD,)))
  d_weights = ExpertWeights(*(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True)))
  return dx_TD.astype(x_TD.dtype), d_weights, d_gate_TK, None


native_experts.defvjp(_forward, _backward)
