"""Choosing the next token."""

import jax
import jax.numpy as jnp


def sample(key: jax.Array, logits_V: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
  """Returns a token, int32 [].

  Args:
    key: randomness.
    logits_V: float32.
    temperature: [], 0 takes the most likely token.
    top_p: [], draws from the fewest tokens whose probability reaches it (arXiv 1904.09751).
  """
  order_V = jnp.argsort(-logits_V)
  probability_V = jax.nn.softmax(logits_V[order_V] / jnp.maximum(temperature, 1e-6))
  # A token stays if those before it have not reached top_p; the first always does.
  kept_V = (jnp.cumsum(probability_V) - probability_V < top_p).at[0].set(True)
  drawn = jax.random.categorical(key, jnp.where(kept_V, jnp.log(probability_V), -jnp.inf))
  return jnp.where(temperature > 0, order_V[drawn], order_V[0]).astype(jnp.int32)
