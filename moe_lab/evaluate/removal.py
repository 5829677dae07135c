"""How much a model leans on one expert: the rise in loss when that expert is taken out of the choice.

The expert's balance bias in one layer is set to minus infinity, so that its
tokens go to their next best; counts stay what the policy gives.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from moe_lab.evaluate.perplexity import EvalStep
from moe_lab.routing.base import RouterState
from moe_lab.types import Batch


def without_expert(router_state: RouterState, layer: int, expert: int) -> RouterState:
  """Returns the state under which no token of the layer chooses the expert."""
  return router_state._replace(bias_E=router_state.bias_E.at[layer, expert].set(-jnp.inf))


def loss_rises(eval_step: EvalStep, params, router_state: RouterState, batches: Sequence[Batch], budget: float) -> dict:
  """Evaluates the same batches with everything in place and without each expert of each layer.

  Args:
    eval_step: of `perplexity.make_eval_step`.
    params: the model's.
    router_state: with the greedy rule's calibration.
    batches: held-out, kept in memory: they are read Z * E + 1 times.
    budget: mean experts asked for.

  Returns:
    loss (nats per token, nothing removed), rise [Z][E] in nats per token, max_rise, and where it is: layer, expert.
  """

  def loss(state: RouterState) -> float:
    total, weight = 0.0, 0.0
    for batch in batches:
      result = eval_step(params, state, batch, budget)
      weights = np.asarray(result.weight_BL, np.float64)
      total += float((np.asarray(result.nll_BL, np.float64) * weights).sum())
      weight += float(weights.sum())
    return total / weight

  whole = loss(router_state)
  layers, experts = router_state.bias_E.shape
  rise_ZE = np.zeros((layers, experts))
  for z, e in np.ndindex(layers, experts):
    rise_ZE[z, e] = loss(without_expert(router_state, z, e)) - whole
  layer, expert = np.unravel_index(rise_ZE.argmax(), rise_ZE.shape)
  return {
    "loss": whole,
    "rise": rise_ZE.tolist(),
    "max_rise": float(rise_ZE.max()),
    "layer": int(layer),
    "expert": int(expert),
  }
