"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split layout."""

import jax
import jax.numpy as jnp


def rotate(x_BLNH: jax.Array, position_L: jax.Array, base: float) -> jax.Array:
  """Rotates each pair (x_h, x_{h + H/2}) by position * base^(-2h/H).

  Args:
    x_BLNH: queries or keys; H even.
    position_L: int32 [L].
    base: of the geometric series of wavelengths.

  Returns:
    The rotated array, same shape and dtype; norms are unchanged.
  """
  half = x_BLNH.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_LH = position_L[:, None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle_LH)[:, None], jnp.cos(angle_LH)[:, None]
  low, high = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BLNH.dtype)
