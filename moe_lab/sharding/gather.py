"""Gathering what devices share, so that gradients are added in float32."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(x: jax.Array, axes: str | tuple[str, ...], dim: int, dtype) -> jax.Array:
  """Returns the parts of all devices along mesh axes, one behind the other; within `shard_map`.

  Args:
    x: this device's part.
    axes: of the mesh.
    dim: along which the parts are put together.
    dtype: that they travel and come in. In the backward pass every device has a share of each gradient: those are
      added in float32, whatever this is.
  """
  return jax.lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)


def _forward(x, axes, dim, dtype):
  return gathered(x, axes, dim, dtype), jnp.zeros((), x.dtype)


def _backward(axes, dim, dtype, like, d):
  part = jax.lax.psum_scatter(d.astype(jnp.float32), axes, scatter_dimension=dim, tiled=True)
  return (part.astype(like.dtype),)


gathered.defvjp(_forward, _backward)
