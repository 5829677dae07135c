"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split layout."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def stretched(frequency: jax.Array, factor: float, low: float, high: float, length: float) -> jax.Array:
  """Returns frequencies for a longer context than the trained one (Llama 3.1, arXiv 2407.21783).

  Wavelengths above length / low become `factor` times longer, those below length / high stay; between the two the
  frequency is a blend, by how many wavelengths the length holds.
  """
  kept = jnp.clip((length * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
  return frequency * (kept + (1 - kept) / factor)


def rotate(x_BLNH: jax.Array, position: jax.Array, base: float, stretch: Sequence[float] = ()) -> jax.Array:
  """Rotates each pair (x_h, x_{h + H/2}) by position * base^(-2h/H).

  Args:
    x_BLNH: queries or keys; H even.
    position: [L] or [B, L], integers, or fractions where positions are interpolated.
    base: of the geometric series of wavelengths.
    stretch: factor, low, high and length of `stretched`; (): as they are.

  Returns:
    The rotated array, same shape and dtype; norms are unchanged.
  """
  half = x_BLNH.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if stretch:
    frequency = stretched(frequency, *stretch)
  angle = position[..., None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle)[..., None, None, :], jnp.cos(angle)[..., None, None, :]
  # As pairs on an axis of their own, whose order is turned: concatenated halves take CPU five times as long.
  pair = x_BLNH.astype(jnp.float32).reshape(*x_BLNH.shape[:-1], 2, half)
  sign = jnp.asarray([[-1.0], [1.0]])
  return (pair * cos + jnp.flip(pair, -2) * (sign * sin)).reshape(x_BLNH.shape).astype(x_BLNH.dtype)
