"""Steers a method's generosity to the budget: a proportional-integral controller.

The level is a number without unit; a higher one means more experts. What it
moves is the method's affair: a threshold on probability, a bias on null
experts. Errors are relative to the budget, so that the gains, which are ours,
suit all. DTop-p (arXiv 2512.13996) steers the threshold of top-p by such a
controller, LongCat-Flash (arXiv 2509.01322) the biases of experts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.base import Observed
from moe_lab.routing.budget_table import table_shape, targets

INTEGRAL_GAIN = 0.05
PROPORTIONAL_GAIN = 0.2


def initial_level(config: RoutingConfig, num_layers: int, start: np.ndarray | float = 0.0) -> dict[str, jax.Array]:
  """Returns the controller's state, [Z] or [Z, J]: "level" is what the method reads; `start` is a `budget_table`."""
  level = np.broadcast_to(np.float32(start), (num_layers, *table_shape(config)))
  return {"level": jnp.array(level), "level_integral": jnp.array(level)}  # two buffers: both are donated


def steered(
  state: dict[str, jax.Array], seen: Observed, config: RoutingConfig, *, per_layer: bool = True
) -> dict[str, jax.Array]:
  """Returns the state after a step: more generous where fewer experts were taken than asked for.

  Args:
    state: holds "level" and "level_integral".
    seen: of the step.
    config: its budgets and mode.
    per_layer: every layer holds the budget by itself; else one level serves all, and their mean holds it.
  """
  error_Z = 1 - seen.count_mean / targets(config)
  if not per_layer:
    error_Z = jnp.broadcast_to(error_Z.mean(0, keepdims=True), error_Z.shape)
  error_Z = jnp.where(seen.asked > 0, error_Z, 0.0)  # a budget that nobody asked for teaches nothing
  integral = state["level_integral"] + INTEGRAL_GAIN * error_Z
  return state | {"level": integral + PROPORTIONAL_GAIN * error_Z, "level_integral": integral}
