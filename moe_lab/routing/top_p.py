"""Top-p routing: the smallest set of experts whose probabilities reach p.

Harder Tasks Need More Experts (arXiv 2403.07652). The gates are the
probabilities over all experts. A flat router wants many experts, so an entropy
loss sharpens it. With p fixed the mean count is what comes of it: no budget is
held. `top_p_pi` is DTop-p (arXiv 2512.13996): a controller moves one p for all
layers until their mean count is the budget, each layer's logits are
standardised and scaled by a learned factor, so that one p can mean different
counts in different layers, and the gates sum to one. Its gains, which act on
the log-odds of p, are ours (`steering.py`). It was published with an entropy
loss of 1e-3, a balance loss of 1e-4 and no z-loss.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import ModelConfig
from moe_lab.routing.base import Assignment, Observed, RouterContext, RouterState, RouterStats
from moe_lab.routing.budget_table import at, knots
from moe_lab.routing.router import Router, per_token
from moe_lab.routing.selection import best, first_slots, replayed, standardised, take
from moe_lab.routing.steering import initial_level, steered


def count_to_reach(prob_TK: jax.Array, threshold: jax.Array) -> jax.Array:
  """Returns count_T: how many of the probabilities, largest first, it takes to reach the threshold ([] or [T])."""
  before_TK = jnp.cumsum(prob_TK, axis=1) - prob_TK
  return (before_TK < jnp.broadcast_to(threshold, before_TK.shape[:1])[:, None]).sum(-1)


class TopP(Router):
  """The `top_p` method: experts until their probabilities reach `config.top_p`, k_min..k_max of them."""

  def threshold(self, context: RouterContext) -> jax.Array | float:
    """Returns p, [] or [T]."""
    return self.config.top_p

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = self.logits(parameters, x_TD)
    score_TE = self.eligible(logits_TE, context)
    expert_TK = best(score_TE, self.config.k_max, context)
    # Experts that are not to be had leave their share to the others, or p could not be reached.
    prob_TE = jax.nn.softmax(jnp.where(jnp.isinf(score_TE), -jnp.inf, logits_TE), axis=-1)
    prob_TK = take(prob_TE, expert_TK)
    count_T = jnp.clip(count_to_reach(prob_TK, self.threshold(context)), self.config.k_min, self.config.k_max)
    assignment = first_slots(prob_TK, expert_TK, replayed(count_T, context), context.mask_T)
    assignment = assignment._replace(gate_TK=self.gates(assignment.gate_TK))
    return assignment, self.stats(logits_TE, assignment, context)

  def gates(self, prob_TK: jax.Array) -> jax.Array:
    """Returns the gates of a token's experts by their probabilities, 0 where there is none."""
    return prob_TK

  def losses(self, stats: RouterStats, state: RouterState):
    # Of the method, against the flat router that takes everything.
    return {"router_entropy": (per_token(stats.entropy_sum, stats.token_count).mean(), self.config.entropy_loss_weight)}


class TopPSteered(TopP):
  """The `top_p_pi` method: top-p whose threshold holds the budget."""

  def parameters(self, model: ModelConfig):
    return super().parameters(model) | {"log_scale": ((1,), 0.0)}

  def logits(self, parameters, x_TD: jax.Array) -> jax.Array:
    return standardised(super().logits(parameters, x_TD), parameters["log_scale"])

  def threshold(self, context: RouterContext) -> jax.Array:
    return jax.nn.sigmoid(at(context.state.method["level"], context.budget_T, self.config))

  def gates(self, prob_TK: jax.Array) -> jax.Array:
    return prob_TK / jnp.maximum(prob_TK.sum(-1, keepdims=True), 1e-9)

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    # The best experts of an untrained router have about twice the mean probability.
    p = np.minimum(2 * knots(self.config) / num_experts, 0.9)
    return initial_level(self.config, num_layers, np.log(p / (1 - p)))

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    return steered(state.method, seen, self.config, per_layer=False)
