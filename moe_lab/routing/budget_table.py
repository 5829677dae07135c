"""Numbers that depend on the budget that is asked for: a small table over budgets, interpolated.

Without `budget_range` there is one budget and a table is one number, of shape
[]. With it a table has J knots, equally far apart in log budget, and each
sequence of training moves the two knots beside its own budget, by their shares
in the interpolation. So one checkpoint holds a price and a calibration for
every budget of the range.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import RoutingConfig

NUM_KNOTS = 8


def table_shape(config: RoutingConfig) -> tuple[int, ...]:
  """Returns the shape of a table: () or (J,)."""
  return (NUM_KNOTS,) if config.budget_range else ()


def knots(config: RoutingConfig) -> np.ndarray:
  """Returns the budgets of a table's entries, in experts: [] or [J]."""
  return np.asarray(np.geomspace(*config.budget_range, NUM_KNOTS) if config.budget_range else config.budget, np.float32)


def targets(config: RoutingConfig) -> np.ndarray | float:
  """Returns the mean counts that controllers aim at, one a knot: [] or [J]."""
  if not config.budget_range:
    return config.target
  share = 1.0 if config.budget_mode == "exactly" else 0.98
  return np.maximum(share * knots(config), config.k_min)


def mean_asked(asked: np.ndarray, config: RoutingConfig) -> float:
  """Returns the budget that tokens asked for on average: `asked` has their number, or [J] those of each knot."""
  return float(asked @ knots(config) / max(asked.sum(), 1e-6)) if config.budget_range else config.budget


def shares(budget_T: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns how much of each knot a budget is made of: ones [T], or [T, J] with rows that sum to one."""
  if not config.budget_range:
    return jnp.ones(budget_T.shape)
  low, high = config.budget_range
  place_T = jnp.log(budget_T / low) / np.log(high / low) * (NUM_KNOTS - 1)
  return jnp.maximum(1 - jnp.abs(jnp.clip(place_T, 0, NUM_KNOTS - 1)[:, None] - jnp.arange(NUM_KNOTS)), 0)


def at(table: jax.Array, budget_T: jax.Array, config: RoutingConfig) -> jax.Array:
  """Reads a table, [] or [J], at each token's budget: [], or [T]."""
  return shares(budget_T, config) @ table if config.budget_range else table


def draw_budgets(key: jax.Array, num: int, config: RoutingConfig) -> jax.Array:
  """Returns the budgets [num] that training asks of its sequences: uniform over the range, or the one.

  Uniform in their logarithm they are low on average, and the model made nothing of a sixth expert.
  """
  if not config.budget_range:
    return jnp.full(num, config.budget)
  low, high = config.budget_range
  return low + jax.random.uniform(key, (num,)) * (high - low)
