"""SwiGLU experts over rows that are already sorted by expert.

Only the first sum(group_sizes) rows hold anything; rows beyond have undefined
output. Back ends, equal in values and gradients:

  reference   every expert on every row, masked: the definition.
  ragged_dot  `jax.lax.ragged_dot`: for GPU and TPU. On CPU it costs E times
              the work; `tiled_experts.py` is for there.
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


def expert_of_row(group_sizes_E, num_rows: int):
  """Returns int32 [num_rows]: the group that each row lies in; E beyond the last."""
  return jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(num_rows), side="right")


def _reference(x_RD, weights: ExpertWeights, group_sizes_E):
  y_ERD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x_RD, *weights)
  expert_R = expert_of_row(group_sizes_E, x_RD.shape[0])
  return jnp.einsum("ERD,RE->RD", y_ERD, jax.nn.one_hot(expert_R, y_ERD.shape[0], dtype=x_RD.dtype))


def _ragged_dot(x_RD, weights: ExpertWeights, group_sizes_E):
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=group_sizes_E, preferred_element_type=jnp.float32)
  hidden = jax.nn.silu(dot(x_RD, weights.gate_EDF)) * dot(x_RD, weights.up_EDF)
  return dot(hidden.astype(x_RD.dtype), weights.down_EFD).astype(x_RD.dtype)


def grouped_mlp(
  x_RD: jax.Array, weights: ExpertWeights, group_sizes_E: jax.Array, *, backend: str = "ragged_dot"
) -> jax.Array:
  """Applies expert e to its group of rows.

  Args:
    x_RD: rows, sorted by expert.
    weights: of all experts, in the rows' dtype.
    group_sizes_E: int32, rows of each expert, summing to at most R.
    backend: reference | ragged_dot.

  Returns:
    [R, D]; rows beyond sum(group_sizes_E) are undefined.
  """
  if backend == "reference":
    return _reference(x_RD, weights, group_sizes_E)
  if backend == "ragged_dot":
    return _ragged_dot(x_RD, weights, group_sizes_E)
  raise ValueError(f"grouped_mlp backend {backend!r}: wanted reference or ragged_dot")
