"""Expert threshold: a token takes each expert whose score passes that expert's own running quantile.

Expert Threshold Routing (arXiv 2603.11535): expert choice made causal. The
threshold of an expert is the running mean of the score above which, in a batch,
lies the share of tokens that it is to get; so load is even and the mean count
is the budget without an auxiliary loss. The gates are sigmoid scores.

What k_max cuts off and k_min adds would move the mean: a controller moves the
share until the budget holds. `k_min = 0` is as published. Published runs begin
with thousands of steps of expert choice, so that no expert starves, and average
over a thousand steps; here the thresholds start at the quantile of an untrained
router's logits and follow faster, and every batch trains by them.
"""

from statistics import NormalDist

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, Observed, RouterContext, RouterState, RouterStats
from moe_lab.routing.router import Router, per_token
from moe_lab.routing.selection import best, first_slots, passing_count, replayed, router_logits, take
from moe_lab.routing.steering import initial_level, steered

DECAY = 0.95  # of the running quantile, a step


def upper_quantile(values_TE: jax.Array, mask_T: jax.Array, share: jax.Array) -> jax.Array:
  """Returns quantile_E: the value that a share of the tokens of `mask_T` is above."""
  sorted_TE = jnp.sort(jnp.where(mask_T[:, None], values_TE, -jnp.inf), axis=0, descending=True)
  above = jnp.round(share * mask_T.sum()).astype(jnp.int32)
  return sorted_TE[jnp.clip(above, 0, jnp.maximum(mask_T.sum() - 1, 0))]


class ExpertThreshold(Router):
  """The `expert_threshold` method: k_min..k_max experts, those whose threshold is passed."""

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = router_logits(x_TD, parameters["router_DE"])
    state = context.state.method
    score_TE = self.eligible(logits_TE - state["threshold_E"], context)
    expert_TK = best(score_TE, self.config.k_max, context)
    count_T = replayed(passing_count(take(score_TE, expert_TK), self.config.k_min), context)
    assignment = first_slots(jax.nn.sigmoid(take(logits_TE, expert_TK)), expert_TK, count_T, context.mask_T)

    share = jnp.clip(self.config.budget / logits_TE.shape[1] * jnp.exp(state["level"]), 0, 1)
    quantile_E = upper_quantile(jax.lax.stop_gradient(logits_TE), context.mask_T, share)
    tokens = context.mask_T.sum()
    sums = {"quantile_E": jnp.where(tokens > 0, tokens * quantile_E, 0.0)}
    return assignment, self.stats(logits_TE, assignment, context, sums=sums)

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    # An untrained router's logits are standard normal.
    share = min(self.config.budget / num_experts, 0.99)
    threshold_ZE = jnp.full((num_layers, num_experts), NormalDist().inv_cdf(1 - share))
    return initial_level(self.config, num_layers) | {"threshold_E": threshold_ZE}

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    quantile_ZE = per_token(seen.sums["quantile_E"], seen.token_count)
    threshold_ZE = DECAY * state.method["threshold_E"] + (1 - DECAY) * quantile_ZE
    return steered(state.method, seen, self.config) | {"threshold_E": threshold_ZE}
