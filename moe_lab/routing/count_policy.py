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

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.budget_table import targets

SHIFT_RATE = 0.05  # of the greedy calibration, a step
_STEEPEST = 12.0  # tilt at which the mean is within 1e-5 of k_min or k_max


@functools.lru_cache
def _tilt_table(k_min: int, k_max: int) -> tuple[np.ndarray, np.ndarray]:
  tilt = _STEEPEST * np.linspace(-1, 1, 2049) ** 3  # closest about 0, where a wide range's mean moves fastest
  counts = np.arange(k_min, k_max + 1)
  # Weighed against the likelier end, so that nothing overflows.
  weights = np.exp(tilt[:, None] * (counts - np.where(tilt > 0, k_max, k_min)[:, None]))
  return (weights @ counts / weights.sum(1)).astype(np.float32), tilt.astype(np.float32)


def budget_log_prior(budget_T: jax.Array, k_min: int, k_max: int) -> jax.Array:
  """Returns log_prior_TA: of all distributions over k_min..k_max with mean `budget_T`, the one of most entropy.

  It is the exponential family p(k) ~ exp(tilt * k); the tilt is looked up by its mean.
  """
  means, tilts = _tilt_table(k_min, k_max)
  tilt_T = jnp.interp(budget_T, jnp.asarray(means), jnp.asarray(tilts))
  return jax.nn.log_softmax(tilt_T[:, None] * jnp.arange(k_min, k_max + 1), axis=-1)


def entropy(log_prob_TA: jax.Array) -> jax.Array:
  """Returns each distribution's entropy, in nats."""
  return -(jnp.exp(log_prob_TA) * log_prob_TA).sum(-1)


def expected_count(log_prob_TA: jax.Array, k_min: int) -> jax.Array:
  """Returns the mean count of each token's distribution, in experts."""
  return jnp.exp(log_prob_TA) @ jnp.arange(k_min, k_min + log_prob_TA.shape[1], dtype=jnp.float32)


def greedy_count(expected_T: jax.Array, shift: jax.Array, k_min: int, k_max: int) -> jax.Array:
  """Returns the counts of inference: the expected count plus a shift ([] or [T]), rounded.

  The most likely count would not do: policies whose samples hold the budget
  fall well below it by argmax. The shift is moved in training
  (`calibrated_shift`) and saved; it is never fitted on evaluation data.
  """
  return jnp.clip(jnp.round(expected_T + shift), k_min, k_max).astype(jnp.int32)


def calibrated_shift(
  shift_Z: jax.Array, sampled_mean_Z: jax.Array, greedy_mean_Z: jax.Array, config: RoutingConfig
) -> jax.Array:
  """Moves the greedy rule's shift after a step.

  Args:
    shift_Z: of each layer, in experts; with a `budget_table` all three are [Z, J].
    sampled_mean_Z: mean of the counts that were sampled.
    greedy_mean_Z: mean of what the greedy rule gave the same tokens.
    config: its budget mode decides what is wanted.

  Returns:
    `exactly`: towards the mean that sampling realised, layer by layer.
    `at_most`: towards the budget, but never above zero: what the policy explores
    with is not what it wants to spend, so an unused budget stays unused.
  """
  if config.budget_mode == "exactly":
    return shift_Z + SHIFT_RATE * (sampled_mean_Z - greedy_mean_Z)
  return jnp.minimum(shift_Z + SHIFT_RATE * (targets(config) - greedy_mean_Z.mean(0)), 0.0)
