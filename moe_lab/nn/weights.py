"""The weights of projections and experts: where they are declared, and how they multiply."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_lab.nn.layers import scaled_normal


class Weight:
  """A weight of a module that is being called; not a pytree, so it does not leave the call."""

  def __init__(self, stored: jax.Array):
    """Args: stored: float32, dimensions as its name says."""
    self._stored = stored

  def dense(self) -> jax.Array:
    """Returns the whole weight, float32."""
    return self._stored

  def project(self, equation: str, x: jax.Array, dtype=None) -> jax.Array:
    """Returns einsum(equation, x, weight) of factors in the type of `x`; the result has that type too, or `dtype`."""
    return jnp.einsum(equation, x, self.dense().astype(x.dtype), preferred_element_type=dtype)


def weight(module: nn.Module, name: str, std: float, shape: tuple[int, ...]) -> Weight:
  """Declares a weight of a module, or finds it among the module's parameters.

  Args:
    module: that is being called.
    name: of the parameter; ends with its dimensions.
    std: of its truncated normal start.
    shape: of the weight.
  """
  return Weight(module.param(name, scaled_normal(std), shape, jnp.float32))
