"""Keeping experts evenly used: load-balance loss and loss-free bias."""

import jax
import jax.numpy as jnp

LOAD_DECAY = 0.95  # of the running load, a step


def load(assigned_ZE: jax.Array) -> jax.Array:
  """Returns load_ZE: share of the layer's rows that each expert got, times E; 1 is the fair share."""
  rows_Z1 = assigned_ZE.sum(-1, keepdims=True)
  return assigned_ZE * assigned_ZE.shape[-1] / jnp.maximum(rows_Z1, 1)


def load_balance_loss(assigned_ZE: jax.Array, prob_sum_ZE: jax.Array, token_count_Z: jax.Array) -> jax.Array:
  """Switch's loss (arXiv 2101.03961, eq. 4), mean over layers: sum_e load_e * probability_e; 1 when even."""
  probability_ZE = prob_sum_ZE / jnp.maximum(token_count_Z, 1)[:, None]
  return jnp.mean(jnp.sum(jax.lax.stop_gradient(load(assigned_ZE)) * probability_ZE, axis=-1))


def updated_load(load_ZE: jax.Array, assigned_ZE: jax.Array) -> jax.Array:
  """Moves the running load towards this step's."""
  return LOAD_DECAY * load_ZE + (1 - LOAD_DECAY) * load(assigned_ZE)


def updated_bias(bias_ZE: jax.Array, assigned_ZE: jax.Array, rate: float) -> jax.Array:
  """Loss-free balancing (arXiv 2408.15664): each bias one step by the sign of its load error.

  Only differences of biases matter to a choice, so their mean, which would
  drift (there are more idle than busy experts), is taken out.
  """
  bias_ZE = bias_ZE + rate * jnp.sign(1 - load(assigned_ZE))
  return bias_ZE - bias_ZE.mean(-1, keepdims=True)
