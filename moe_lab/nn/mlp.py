"""The dense SwiGLU MLP."""

import flax.linen as nn
import jax.numpy as jnp

from moe_lab.nn.weights import Weight
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
    gate = Weight(self, "gate_DF", dim**-0.5, (dim, self.hidden))
    up = Weight(self, "up_DF", dim**-0.5, (dim, self.hidden))
    down = Weight(self, "down_FD", self.out_scale * self.hidden**-0.5, (self.hidden, dim))
    return swiglu(x, gate, up, down, dot=lambda equation, x, w: w.project(equation, x, jnp.float32))
