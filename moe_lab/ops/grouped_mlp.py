"""SwiGLU experts over rows that are already sorted by expert.

Only the first sum(group_sizes) rows hold anything; rows beyond have undefined
output. Back ends, equal in values and gradients:

  reference   every expert on every row, masked: the definition.
  ragged_dot  `jax.lax.ragged_dot`: for TPU. On CPU and GPU it costs E times
              the work and memory; `tiled_experts.py` is for there.
  tokamax     kernels of the tokamax library (Mosaic, Triton), which it
              chooses for the device: for GPU; an extra of this package.
"""

import functools
import importlib
import importlib.util
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.errors import ConfigError
from moe_lab.ops.quantised import Quantised, unpacked
from moe_lab.ops.tpu_quantised import tpu_quantised_dot


class ExpertWeights(NamedTuple):
  """SwiGLU weights (arXiv 2002.05202): (silu(x gate) * (x up)) down."""

  gate_EDF: jax.Array | Quantised
  up_EDF: jax.Array | Quantised
  down_EFD: jax.Array | Quantised


def num_experts_of(weights: ExpertWeights) -> int:
  """Returns E, of weights in whatever form."""
  return jax.tree.leaves(weights)[0].shape[0]


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def swiglu(x, gate, up, down, dot=_dot):
  """One expert, [..., D] -> [..., D]; the hidden product is taken in float32: `dot` of an equation, x and a weight."""
  hidden = jax.nn.silu(dot("...D,DF->...F", x, gate)) * dot("...D,DF->...F", x, up)
  return dot("...F,FD->...D", hidden.astype(x.dtype), down).astype(x.dtype)


def expert_of_row(group_sizes_E, num_rows: int):
  """Returns int32 [num_rows]: the group that each row lies in; E beyond the last."""
  return jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(num_rows), side="right")


def _reference(x_RD, weights: ExpertWeights, group_sizes_E):
  weights = ExpertWeights(*(unpacked(w, x_RD.dtype) for w in weights))
  y_ERD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x_RD, *weights)
  expert_R = expert_of_row(group_sizes_E, x_RD.shape[0])
  return jnp.einsum("ERD,RE->RD", y_ERD, jax.nn.one_hot(expert_R, y_ERD.shape[0], dtype=x_RD.dtype))


def tgmm_weight_gradient(x_RD, dy_RF, group_sizes_E, *, interpret: bool = False):
  """dw_EDF of `grouped_dot` by MegaBlocks' kernel for TPU (arXiv 2211.15841), which visits each row once.

  XLA turns ragged_dot's own gradient into a dense product with masks on TPU: E times the work.
  """
  # Imported here, since Pallas is slow to load; by name, since the package hides the module behind a function.
  tgmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm").tgmm
  (rows, dim), hidden = x_RD.shape, dy_RF.shape[1]
  tiling = (math.gcd(rows, 512), min(dim, 512), min(hidden, 512))
  return tgmm(x_RD.T, dy_RF, group_sizes_E, jnp.float32, tiling, interpret=interpret)


def xla_weight_gradient(x_RD, dy_RF, group_sizes_E):
  """dw_EDF of `grouped_dot` as XLA does it: contracts each group's rows."""
  dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
  return jax.lax.ragged_dot_general(x_RD, dy_RF, group_sizes_E, dims, preferred_element_type=jnp.float32)


@jax.custom_vjp
def grouped_dot(x_RD, w_EDF, group_sizes_E):
  """Returns float32 [R, F]: each row times the matrix of its group."""
  return jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=jnp.float32)


def _grouped_dot_backward(saved, dy_RF):
  x_RD, w_EDF, group_sizes_E = saved
  dy_RF = dy_RF.astype(x_RD.dtype)
  dx_RD = jax.lax.ragged_dot(dy_RF, w_EDF.swapaxes(1, 2), group_sizes_E, preferred_element_type=jnp.float32)
  # Chosen when it is lowered: a compilation ahead of time for TPU runs on a machine whose own backend is CPU.
  dw_EDF = jax.lax.platform_dependent(x_RD, dy_RF, group_sizes_E, tpu=tgmm_weight_gradient, default=xla_weight_gradient)
  return dx_RD.astype(x_RD.dtype), dw_EDF.astype(w_EDF.dtype), None


grouped_dot.defvjp(lambda *inputs: (grouped_dot(*inputs), inputs), _grouped_dot_backward)


def unpacked_dot(x_RD, q_EDF: Quantised, group_sizes_E):
  """As `grouped_dot`, of matrices in 4 bits, which are all unpacked first."""
  return jax.lax.ragged_dot(x_RD, unpacked(q_EDF, x_RD.dtype), group_sizes_E, preferred_element_type=jnp.float32)


@jax.custom_vjp
def quantised_dot(x_RD, q_EDF: Quantised, group_sizes_E):
  """As `unpacked_dot`; on TPU by a kernel that reads the matrices as they are. They have no gradient."""
  return jax.lax.platform_dependent(x_RD, q_EDF, group_sizes_E, tpu=tpu_quantised_dot, default=unpacked_dot)


def _quantised_dot_backward(saved, dy_RF):
  x_RD, q_EDF, group_sizes_E = saved
  w_EFD = unpacked(q_EDF, x_RD.dtype).swapaxes(1, 2)
  dx_RD = jax.lax.ragged_dot(dy_RF.astype(x_RD.dtype), w_EFD, group_sizes_E, preferred_element_type=jnp.float32)
  return dx_RD.astype(x_RD.dtype), None, None


quantised_dot.defvjp(lambda *inputs: (quantised_dot(*inputs), inputs), _quantised_dot_backward)


def has_tokamax() -> bool:
  """Returns whether the tokamax library is installed: GPUs want it, since XLA masks there, at E times the work."""
  return importlib.util.find_spec("tokamax") is not None


def _tokamax(x, y, group_sizes_E, contracted: tuple[int, int], groups: tuple[int, ...]):
  """A product over ragged rows by tokamax, float32; `contracted` names a dimension of each, `groups` y's of groups."""
  try:
    import tokamax
  except ImportError:
    wanted = "the tokamax library, pip install -e '.[kernels]', or another back end"
    raise ConfigError("model.grouped_matmul", "tokamax", wanted) from None
  a, b = contracted
  dims = jax.lax.RaggedDotDimensionNumbers((((a,), (b,)), ((), ())), (0,), groups)
  return tokamax.ragged_dot_general(x, y, group_sizes_E, dims, preferred_element_type=jnp.float32)


def _cleared(y_RD, group_sizes_E):
  """Zeros where no group is, which kernels leave as the memory was.

  The one for weights' gradients (Mosaic, Hopper) multiplies such rows by zero, which a NaN survives.
  """
  return jnp.where(jnp.arange(y_RD.shape[0])[:, None] < group_sizes_E.sum(), y_RD, 0)


@jax.custom_vjp
def _tokamax_dot(x_RD, w_EDF, group_sizes_E):
  return _cleared(_tokamax(x_RD, w_EDF, group_sizes_E, (1, 1), (0,)), group_sizes_E)


def _tokamax_dot_backward(saved, dy_RF):
  # tokamax's own gradient wants the float32 of the result for both factors: kernels for Hopper want one type.
  x_RD, w_EDF, group_sizes_E = saved
  dy_RF = dy_RF.astype(x_RD.dtype)
  dx_RD = _cleared(_tokamax(dy_RF, w_EDF, group_sizes_E, (1, 2), (0,)), group_sizes_E)
  dw_EDF = _tokamax(x_RD, dy_RF, group_sizes_E, (0, 0), ())
  return dx_RD.astype(x_RD.dtype), dw_EDF.astype(w_EDF.dtype), None


_tokamax_dot.defvjp(lambda *inputs: (_tokamax_dot(*inputs), inputs), _tokamax_dot_backward)


def tokamax_dot(x_RD, w_EDF, group_sizes_E):
  """As `grouped_dot`, by tokamax, whose kernels for Hopper want rows of multiples of 16 bytes."""
  width, unit = w_EDF.shape[2], 16 // x_RD.dtype.itemsize
  more_d, more_f = -w_EDF.shape[1] % unit, -width % unit
  x_RD = jnp.pad(x_RD, ((0, 0), (0, more_d)))
  return _tokamax_dot(x_RD, jnp.pad(w_EDF, ((0, 0), (0, more_d), (0, more_f))), group_sizes_E)[:, :width]


def _by_dots(x_RD, weights: ExpertWeights, group_sizes_E, dot):
  if isinstance(weights.gate_EDF, Quantised) and dot is grouped_dot:
    dot = quantised_dot
  # Kernels for GPU take arrays alone: these are unpacked for them.
  weights = weights if dot is quantised_dot else ExpertWeights(*(unpacked(w, x_RD.dtype) for w in weights))
  rows = x_RD.shape[0]
  # Only whole blocks of eight rows get a kernel on TPU; others cost E times the work.
  x_RD = jnp.pad(x_RD, ((0, -rows % 8), (0, 0)))
  hidden = jax.nn.silu(dot(x_RD, weights.gate_EDF, group_sizes_E)) * dot(x_RD, weights.up_EDF, group_sizes_E)
  return dot(hidden.astype(x_RD.dtype), weights.down_EFD, group_sizes_E).astype(x_RD.dtype)[:rows]


def grouped_mlp(
  x_RD: jax.Array, weights: ExpertWeights, group_sizes_E: jax.Array, *, backend: str = "ragged_dot"
) -> jax.Array:
  """Applies expert e to its group of rows.

  Args:
    x_RD: rows, sorted by expert.
    weights: of all experts, in the rows' dtype, or in 4 bits, which have no gradient; ragged_dot alone reads those as
      they are, on TPU.
    group_sizes_E: int32, rows of each expert, summing to at most R.
    backend: reference | ragged_dot | tokamax.

  Returns:
    [R, D]; rows beyond sum(group_sizes_E) are undefined.
  """
  if backend == "reference":
    return _reference(x_RD, weights, group_sizes_E)
  if backend == "ragged_dot":
    return _by_dots(x_RD, weights, group_sizes_E, grouped_dot)
  if backend == "tokamax":
    return _by_dots(x_RD, weights, group_sizes_E, tokamax_dot)
  raise ValueError(f"grouped_mlp backend {backend!r}: wanted reference, ragged_dot or tokamax")
