"""Next-token loss from hidden states: head, softmax and their gradients in chunks of tokens.

The logits of all tokens are the largest array of a small model's step. They
are never held: a chunk's logits are computed, turned into losses and, where a
gradient is wanted, into that gradient at once, in the forward pass. That is
possible because the loss is linear in the tokens' losses with weights known
beforehand (as in Liger Kernel, arXiv 2410.10989), and takes three products of
the head's size where recomputing the logits would take four.
"""

import functools

import jax
import jax.numpy as jnp

from moe_lab.ops.row_sum import row_sum

CHUNK = 256  # tokens; of 128 to 1024 the fastest on CPU at V = 8192, and long enough for a full dot elsewhere

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
  """Returns float32 -log softmax(logits)[target], in nats, over the last axis: the definition."""
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def _chunks(x_T, chunk: int):
  """[T, ...] -> [T / chunk, chunk, ...], padded with zeros."""
  x_T = jnp.pad(x_T, [(0, -x_T.shape[0] % chunk)] + [(0, 0)] * (x_T.ndim - 1))
  return x_T.reshape(-1, chunk, *x_T.shape[1:])


def head_losses(x_TD: jax.Array, head_VD: jax.Array, target_T: jax.Array, chunk: int = CHUNK) -> jax.Array:
  """Returns nll_T: float32, each token's `cross_entropy` under the logits x head, in nats; no gradient.

  Args:
    x_TD: hidden states after the final norm.
    head_VD: output embedding; cast to the hidden states' type.
    target_T: int32.
    chunk: tokens whose logits are held at a time.
  """
  head_VD = head_VD.astype(x_TD.dtype)

  def one_chunk(inputs):
    x, target = inputs
    return cross_entropy(_dot("TD,VD->TV", x, head_VD), target)

  chunk = min(chunk, x_TD.shape[0])
  nll = jax.lax.map(one_chunk, (_chunks(x_TD, chunk), _chunks(target_T, chunk)))
  return jax.lax.stop_gradient(nll.reshape(-1)[: x_TD.shape[0]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_head_loss(
  x_TD: jax.Array, head_VD: jax.Array, target_T: jax.Array, weight_T: jax.Array, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of weight * nll (float32 []), and nll_T, through which no gradient flows.

  Args as in `head_losses`, and:
    weight_T: float32, of each token; without gradient.
  """
  nll_T = head_losses(x_TD, head_VD, target_T, chunk)
  return jnp.sum(nll_T * weight_T), nll_T


def _forward(x_TD, head_VD, target_T, weight_T, chunk):
  chunk = min(chunk, x_TD.shape[0])
  weights_VD = head_VD.astype(x_TD.dtype)

  def one_chunk(d_head_DV, inputs):
    x, target, weight = inputs
    logits = _dot("TD,VD->TV", x, weights_VD)
    highest = logits.max(-1, keepdims=True)
    power = jnp.exp(logits - highest)
    total = row_sum(power)[:, None]
    nll = (jnp.log(total) + highest - jnp.take_along_axis(logits, target[:, None], axis=1))[:, 0]
    is_target = jnp.arange(logits.shape[1]) == target[:, None]
    d_logits = power * (weight[:, None] / total) - jnp.where(is_target, weight[:, None], 0)
    d_logits = d_logits.astype(x.dtype)
    # The transpose of the head's gradient: turning x is cheaper than turning the logits.
    return d_head_DV + _dot("TD,TV->DV", x, d_logits), (_dot("TV,VD->TD", d_logits, weights_VD).astype(x.dtype), nll)

  start = jnp.zeros(head_VD.mT.shape, jnp.float32)
  d_head_DV, (dx, nll) = jax.lax.scan(one_chunk, start, tuple(_chunks(a, chunk) for a in (x_TD, target_T, weight_T)))
  tokens = x_TD.shape[0]
  nll_T = nll.reshape(-1)[:tokens]
  dx_TD = dx.reshape(-1, x_TD.shape[1])[:tokens]
  return (jnp.sum(nll_T * weight_T), nll_T), (dx_TD, d_head_DV.mT.astype(head_VD.dtype), weight_T)


def _backward(chunk, saved, cotangents):
  dx_TD, d_head_VD, weight_T = saved
  scale = cotangents[0]
  return (scale * dx_TD).astype(dx_TD.dtype), scale * d_head_VD, None, jnp.zeros_like(weight_T)


weighted_head_loss.defvjp(_forward, _backward)
