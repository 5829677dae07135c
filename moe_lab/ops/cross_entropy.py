"""Next-token loss."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BLV: jax.Array, target_BL: jax.Array) -> jax.Array:
  """Returns nll_BL: float32, -log softmax(logits)[target], in nats."""
  logits_BLV = logits_BLV.astype(jnp.float32)
  picked_BL = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BLV, axis=-1) - picked_BL
