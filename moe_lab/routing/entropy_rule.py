"""The router-entropy rule: a control that spends where the router is undecided, without learning to.

An undecided router is taken for a hard token; but unpredictable tokens gain
nothing from experts, so this is what a learned count has to beat. The count is
log-normal about a level: exp(level + spread * z), rounded, with z the entropy
of the token's router probabilities in standard deviations of its layer. Mean
and deviation are running ones; a controller holds the mean count at the budget.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.routing.base import Assignment, Observed, RouterContext, RouterState, RouterStats
from moe_lab.routing.budget_table import at, knots
from moe_lab.routing.router import Router, per_token
from moe_lab.routing.selection import assign, replayed
from moe_lab.routing.steering import initial_level, steered

SPREAD = 0.6  # of log count, a standard deviation of entropy: counts 1, 2, 4 are one deviation apart, about
DECAY = 0.95  # of the running entropy, a step


def entropy_count(entropy_T: jax.Array, mean: jax.Array, square: jax.Array, level: jax.Array) -> jax.Array:
  """Returns the counts, not yet clipped; `mean` and `square` are the entropy's first two moments."""
  deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-8))
  return jnp.round(jnp.exp(level + SPREAD * (entropy_T - mean) / deviation)).astype(jnp.int32)


class EntropyRule(Router):
  """The `entropy_rule` method."""

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = self.logits(parameters, x_TD)
    log_prob_TE = jax.nn.log_softmax(jax.lax.stop_gradient(logits_TE), axis=-1)
    entropy_T = -(jnp.exp(log_prob_TE) * log_prob_TE).sum(-1)
    state = context.state.method
    level = at(state["level"], context.budget_T, self.config)
    count_T = entropy_count(entropy_T, state["entropy"], state["entropy_square"], level)
    count_T = replayed(jnp.clip(count_T, self.config.k_min, self.config.k_max), context)
    assignment = assign(logits_TE, self.ranked(logits_TE, context), count_T, context.mask_T, self.config.slot_gate)
    mask_T = context.mask_T.astype(jnp.float32)
    sums = {"entropy": mask_T @ entropy_T, "entropy_square": mask_T @ jnp.square(entropy_T)}
    return assignment, self.stats(logits_TE, assignment, context, sums=sums)

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    # Logits of unit variance take about half a nat from the entropy.
    mean = max(math.log(num_experts) - 0.5, 0.1)
    moments = {"entropy": jnp.full(num_layers, mean), "entropy_square": jnp.full(num_layers, mean**2 + 0.02)}
    return initial_level(self.config, num_layers, np.log(knots(self.config))) | moments

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    def moved(name):
      return DECAY * state.method[name] + (1 - DECAY) * per_token(seen.sums[name], seen.token_count)

    moments = {name: moved(name) for name in ("entropy", "entropy_square")}
    return steered(state.method, seen, self.config) | moments
