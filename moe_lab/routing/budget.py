"""The budget controller: moves the price of an expert until the mean count holds the budget.

The price (lambda, in nats per expert) is what the policy pays for each expert.
It is `pressure * scale`: the scale is the running size of the policy's
advantages, so that the controller's gains need no tuning to the loss; the
pressure is a proportional-integral controller on the relative error of the
mean count (dual ascent with damping). `exactly` lets the price go negative;
`at_most` keeps it at least `lambda_min`, so that slack never makes noise free.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.budget_table import knots, table_shape, targets

INTEGRAL_GAIN = 0.02
PROPORTIONAL_GAIN = 1.0
SCALE_DECAY = 0.95
MEAN_DECAY = 0.8


class BudgetState(NamedTuple):
  """The controller's memory; in the checkpoint.

  Attributes:
    integral: accumulated pressure; this and the mean are a `budget_table`, [] or [J].
    mean: running mean of the realised count, in experts.
    scale: [], running root mean square of the advantages, in nats; 0 before the first.
  """

  integral: jax.Array
  mean: jax.Array
  scale: jax.Array


def initial_budget_state(config: RoutingConfig) -> BudgetState:
  """Returns the state of an untrained policy, which holds the budget by construction."""
  return BudgetState(integral=jnp.zeros(table_shape(config)), mean=jnp.asarray(knots(config)), scale=jnp.zeros(()))


def price(state: BudgetState, config: RoutingConfig) -> jax.Array:
  """Returns lambda, nats per expert: a `budget_table`, [] or [J]."""
  pressure = state.integral + PROPORTIONAL_GAIN * (state.mean - targets(config)) / targets(config)
  raw = pressure * state.scale
  return raw if config.budget_mode == "exactly" else jnp.maximum(raw, config.lambda_min)


def updated_scale(scale: jax.Array, mean_square_advantage: jax.Array) -> jax.Array:
  """Returns the running scale; the first observation is taken as it is."""
  new = jnp.sqrt(mean_square_advantage)
  return jnp.where(scale > 0, SCALE_DECAY * scale + (1 - SCALE_DECAY) * new, new)


def updated(state: BudgetState, config: RoutingConfig, mean_count, scale) -> BudgetState:
  """Takes in one step's mean count (experts) and advantage scale (nats)."""
  mean = MEAN_DECAY * state.mean + (1 - MEAN_DECAY) * mean_count
  integral = state.integral + INTEGRAL_GAIN * (mean - targets(config)) / targets(config)
  if config.budget_mode == "at_most":
    integral = jnp.maximum(integral, 0.0)  # no credit for slack, or a later overrun would be free
  return BudgetState(integral, mean, scale)
