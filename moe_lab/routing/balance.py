"""Keeping experts evenly used: load-balance loss and loss-free bias."""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import RouterStats

LOAD_DECAY = 0.95  # of the running load, a step


def load(assigned_ZE: jax.Array) -> jax.Array:
  """Returns load_ZE: share of the layer's rows that each expert got, times E; 1 is the fair share."""
  rows_Z1 = assigned_ZE.sum(-1, keepdims=True)
  return assigned_ZE * assigned_ZE.shape[-1] / jnp.maximum(rows_Z1, 1)


def load_balance_loss(assigned_ZE: jax.Array, prob_sum_ZE: jax.Array, token_count_Z: jax.Array) -> jax.Array:
  """Switch's loss (arXiv 2101.03961, eq. 4), mean over layers: sum_e load_e * probability_e; 1 when even."""
  probability_ZE = prob_sum_ZE / jnp.maximum(token_count_Z, 1)[:, None]
  return jnp.mean(jnp.sum(jax.lax.stop_gradient(load(assigned_ZE)) * probability_ZE, axis=-1))


def sequence_balance_loss(assigned_ZBE: jax.Array, prob_ZBE: jax.Array) -> jax.Array:
  """As `load_balance_loss`, for each sequence by itself (DeepSeek-V3, arXiv 2412.19437, eq. 17); mean over tokens."""
  tokens_ZB1 = prob_ZBE.sum(-1, keepdims=True)
  loss_ZB = jnp.sum(jax.lax.stop_gradient(load(assigned_ZBE)) * prob_ZBE / jnp.maximum(tokens_ZB1, 1e-6), axis=-1)
  weight_ZB = jax.lax.stop_gradient(tokens_ZB1[..., 0])
  return jnp.mean((loss_ZB * weight_ZB).sum(-1) / jnp.maximum(weight_ZB.sum(-1), 1e-6))


def balance_loss(stats: RouterStats, scope: str, earlier_ZE: jax.Array | float = 0.0) -> jax.Array:
  """Returns the load-balance loss over what is to be even.

  Args:
    stats: of a micro-batch, [Z, ...].
    scope: local (the micro-batch, on all devices) | sequence | global (the step's batch: the load counts the
      micro-batches before this one too, arXiv 2501.11873).
    earlier_ZE: rows by expert of the step's earlier micro-batches.
  """
  if scope == "sequence":
    return sequence_balance_loss(stats.sequences.assigned_BE, stats.sequences.prob_BE)
  assigned_ZE = stats.assigned_E + (earlier_ZE if scope == "global" else 0.0)
  return load_balance_loss(assigned_ZE, stats.prob_sum_E, stats.token_count)


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
