"""The count policy: a distribution over how many experts a token gets.

Its logits are a learned function of the hidden state, which starts at zero,
plus the log-probability of the count under the maximum-entropy distribution
whose mean is the budget. An untrained policy thus draws random counts that
hold any budget: the random-k warm-up (Matryoshka MoE, arXiv 2509.26520) is
this policy before its first update, and learning starts from there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_STEEPEST = 12.0  # tilt at which the mean is within 1e-5 of k_min or k_max


@functools.lru_cache
def _tilt_table(k_min: int, k_max: int) -> tuple[np.ndarray, np.ndarray]:
  tilt = np.linspace(-_STEEPEST, _STEEPEST, 2049)
  counts = np.arange(k_min, k_max + 1)
  weights = np.exp(tilt[:, None] * (counts - (k_min + k_max) / 2))
  return (weights @ counts / weights.sum(1)).astype(np.float32), tilt.astype(np.float32)


def budget_log_prior(budget_T: jax.Array, k_min: int, k_max: int) -> jax.Array:
  """Returns log_prior_TA: of all distributions over k_min..k_max with mean `budget_T`, the one of most entropy.

  It is the exponential family p(k) ~ exp(tilt * k); the tilt is looked up by its mean.
  """
  means, tilts = _tilt_table(k_min, k_max)
  tilt_T = jnp.interp(budget_T, jnp.asarray(means), jnp.asarray(tilts))
  return jax.nn.log_softmax(tilt_T[:, None] * jnp.arange(k_min, k_max + 1), axis=-1)


def expected_count(log_prob_TA: jax.Array, k_min: int) -> jax.Array:
  """Returns the mean count of each token's distribution, in experts."""
  return jnp.exp(log_prob_TA) @ jnp.arange(k_min, k_min + log_prob_TA.shape[1], dtype=jnp.float32)


def greedy_count(expected_T: jax.Array, shift: jax.Array, k_min: int, k_max: int) -> jax.Array:
  """Returns the counts of inference: the expected count plus a shift, rounded.

  The most likely count would not do: policies whose samples hold the budget
  fall well below it by argmax. The shift is moved in training
  (`calibrated_shift`) until the rounded counts average what the samples do.
  """
  return jnp.clip(jnp.round(expected_T + shift), k_min, k_max).astype(jnp.int32)


def calibrated_shift(shift, sampled_mean, greedy_mean, rate: float = 0.05):
  """Moves the greedy rule's shift towards the mean that sampling realised, in experts."""
  return shift + rate * (sampled_mean - greedy_mean)
