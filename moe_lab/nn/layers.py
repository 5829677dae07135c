"""Small layers: RMSNorm, the embedding that is also the head, initialisers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_lab.ops.row_sum import row_sum


def scaled_normal(std: float):
  """Truncated normal with the given standard deviation; zeros for 0."""
  return nn.initializers.zeros if std == 0 else nn.initializers.truncated_normal(std)


def rms_normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """Divides by the root mean square over the last axis, in float32 (arXiv 1910.07467)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(row_sum(jnp.square(x))[..., None] / x.shape[-1] + epsilon)


class RMSNorm(nn.Module):
  """RMSNorm with a gain; the result has the input's type."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x):
    gain = self.param("gain_D", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    return (rms_normalise(x, self.epsilon) * gain).astype(x.dtype)
