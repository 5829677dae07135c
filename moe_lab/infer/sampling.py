"""Choosing the next token, for each sequence by its own settings and its own randomness."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TOP = 20  # most of the likeliest tokens that come beside a drawn one


class Sampling(NamedTuple):
  """How each sequence draws, [B]; filters apply to the probabilities at `temperature`, top_k first.

  Attributes:
    temperature: float32; 0 takes the most likely token.
    top_k: int32, draws from so many likeliest tokens; 0: from all.
    top_p: float32, from the fewest of these whose share of them reaches it (arXiv 1904.09751).
    min_p: float32, and from those at least so likely, as a share of the likeliest (arXiv 2407.01082).
    seed: int32. A sequence's draws depend on it and on its own tokens' number only, not on the batch.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  seed: jax.Array


def _highest_threshold(probability_V: jax.Array, enough) -> jax.Array:
  """Returns the highest threshold t for which `enough(probability_V >= t)`; it must hold for 0.

  Bisection on the bits, which floats that are not negative share their order with: exact in 31 passes over V, where
  sorting 8192 numbers takes XLA on CPU 1.5 ms.
  """

  def halve(_, bounds):
    low, high = bounds  # enough at low, not at high
    middle = low + (high - low) // 2
    kept_V = probability_V >= jax.lax.bitcast_convert_type(middle, jnp.float32)
    is_enough = enough(kept_V)
    return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

  above_all = jnp.int32(0x7F800000)  # infinity
  low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), above_all))
  return jax.lax.bitcast_convert_type(low, jnp.float32)


def kept(probability_V: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
  """Returns bool [V]: the tokens to draw from; those as likely as the last of them stay too. Arguments: `Sampling`."""
  wanted = jnp.where(top_k > 0, jnp.minimum(top_k, probability_V.size), probability_V.size)
  kept_V = probability_V >= _highest_threshold(probability_V, lambda kept_V: kept_V.sum() >= wanted)
  probability_V = jnp.where(kept_V, probability_V, 0.0)
  share = top_p * probability_V.sum()
  least = _highest_threshold(probability_V, lambda kept_V: jnp.where(kept_V, probability_V, 0.0).sum() >= share)
  highest = probability_V.max()
  return kept_V & (probability_V >= jnp.minimum(jnp.maximum(least, min_p * highest), highest))


def argmax(logits_BV: jax.Array) -> jax.Array:
  """Returns the first token with the highest logit; jax's own keeps pairs, and XLA on CPU takes ten times as long."""
  size = logits_BV.shape[-1]
  is_highest_BV = logits_BV >= logits_BV.max(-1, keepdims=True)
  return jnp.minimum(jnp.where(is_highest_BV, jnp.arange(size, dtype=jnp.int32), size).min(-1), size - 1)


def _draw(logits_V: jax.Array, index: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token; `index` numbers the sequence's own draws."""
  probability_V = jax.nn.softmax(logits_V / jnp.maximum(sampling.temperature, 1e-6))
  kept_V = kept(probability_V, sampling.top_k, sampling.top_p, sampling.min_p)
  key = jax.random.fold_in(jax.random.key(sampling.seed), index)
  noised_V = jnp.where(kept_V, jnp.log(probability_V) + jax.random.gumbel(key, logits_V.shape), -jnp.inf)
  return argmax(jnp.where(sampling.temperature > 0, noised_V, logits_V))


def sample(logits_BV: jax.Array, index_B: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """Returns token_B (int32), and log_prob_B: its log-probability at temperature 1 and without filters, in nats.

  Args:
    logits_BV: float32.
    index_B: int32, how many tokens each sequence has drawn before.
    sampling: [B].
  """
  token_B = jax.lax.cond(
    jnp.any(sampling.temperature > 0),
    lambda: jax.vmap(_draw)(logits_BV, index_B, sampling),
    lambda: argmax(logits_BV),
  )
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def likeliest(logits_TV: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the TOP likeliest tokens, int32 [T, TOP], and their log-probabilities in nats; zeros unless `wanted`."""
  num = min(TOP, logits_TV.shape[-1])

  def sort():
    logit_TK, token_TK = jax.lax.top_k(logits_TV, num)
    return token_TK, logit_TK - jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True)

  def nothing():
    return jnp.zeros((len(logits_TV), num), jnp.int32), jnp.zeros((len(logits_TV), num))

  return jax.lax.cond(wanted, sort, nothing)
