"""Learned thresholds: every expert has one, and a token takes all experts whose threshold its score passes.

DynMoE (arXiv 2405.14297): the score is the cosine of the token and the
expert's embedding; the thresholds learn through a straight-through estimator;
those taken share the output evenly. Its auxiliary loss keeps the experts'
embeddings apart and short. A token that passes no threshold takes its k_min
best, but none in training.

The published method holds no budget: here a controller adds a level to all
scores of a layer, so that it can be compared at equal compute. It also starts
from orthogonal embeddings, and adds and removes experts as it trains: here
their number stays.
"""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import ModelConfig
from moe_lab.routing.base import Assignment, Observed, RouterContext, RouterState, RouterStats
from moe_lab.routing.budget_table import at, knots
from moe_lab.routing.router import Router, per_token
from moe_lab.routing.selection import best, first_slots, passing_count, replayed, router_logits, take
from moe_lab.routing.steering import initial_level, steered

EMBEDDING_WEIGHT = 1e-2  # of both losses, as published


class LearnedThreshold(Router):
  """The `learned_threshold` method: k_min..k_max experts, those whose threshold is passed."""

  def parameters(self, model: ModelConfig):
    return super().parameters(model) | {"threshold_E": ((model.num_experts,), 0.0)}

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    router_DE, dim = parameters["router_DE"], x_TD.shape[1]
    unit_DE = router_DE / jnp.linalg.norm(router_DE, axis=0, keepdims=True)
    x_TD = x_TD.astype(jnp.float32)
    unit_TD = x_TD / jnp.maximum(jnp.linalg.norm(x_TD, axis=1, keepdims=True), 1e-6)
    logits_TE = router_logits(unit_TD, unit_DE) * dim**0.5  # the cosine, in units of its deviation by chance
    level = at(context.state.method["level"], context.budget_T, self.config)
    over_TE = logits_TE - parameters["threshold_E"] + jnp.broadcast_to(level, x_TD.shape[:1])[:, None]
    score_TE = self.eligible(over_TE, context)
    expert_TK = best(score_TE, self.config.k_max, context)
    least = self.config.k_min if context.key is None else 0
    count_T = replayed(passing_count(take(score_TE, expert_TK), least), context)

    # Taken or not is 1 or 0; its gradient is that of a sigmoid (straight-through).
    soft_TK = jax.nn.sigmoid(take(over_TE, expert_TK))
    gate_TK = (1 + soft_TK - jax.lax.stop_gradient(soft_TK)) / jnp.maximum(count_T, 1)[:, None]
    assignment = first_slots(gate_TK, expert_TK, count_T, context.mask_T)
    gram_EE = unit_DE.T @ unit_DE
    apart = jnp.sqrt(jnp.square(gram_EE - jnp.eye(gram_EE.shape[0])).sum() + 1e-12)
    tokens, length = context.mask_T.sum(), jnp.linalg.norm(router_DE, axis=0).mean()
    sums = {"diversity": tokens * apart, "simplicity": tokens * length}
    return assignment, self.stats(logits_TE, assignment, context, sums=sums)

  def losses(self, stats: RouterStats, state: RouterState):
    names = ("diversity", "simplicity")
    return {name: (per_token(stats.sums[name], stats.token_count).mean(), EMBEDDING_WEIGHT) for name in names}

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    # An untrained router's scores are normal: so many pass that the budget holds.
    share = np.minimum(knots(self.config) / num_experts, 0.99)
    return initial_level(self.config, num_layers, np.vectorize(NormalDist().inv_cdf)(share))

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    return steered(state.method, seen, self.config)
