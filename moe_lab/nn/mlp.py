"""The dense SwiGLU MLP."""

import flax.linen as nn
import jax.numpy as jnp

from moe_lab.nn.layers import scaled_normal
from moe_lab.ops.grouped_mlp import swiglu


class MLP(nn.Module):
  """SwiGLU of hidden width `hidden`, [..., D] -> [..., D].

  Attributes:
    hidden: F.
    out_scale: multiplies the output projection's standard deviation at the start.
  """

  hidden: int
  out_scale: float

  @nn.compact
  def __call__(self, x):
    dim = x.shape[-1]
    gate = self.param("gate_DF", scaled_normal(dim**-0.5), (dim, self.hidden), jnp.float32)
    up = self.param("up_DF", scaled_normal(dim**-0.5), (dim, self.hidden), jnp.float32)
    down = self.param("down_FD", scaled_normal(self.out_scale * self.hidden**-0.5), (self.hidden, dim), jnp.float32)
    return swiglu(x, gate.astype(x.dtype), up.astype(x.dtype), down.astype(x.dtype))
