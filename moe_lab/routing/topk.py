"""Fixed top-k routing: every token gets its k best experts.

The softmax over the chosen with k = 2 is Mixtral (arXiv 2401.04088). With k = 1
it is the constant one, through which the router learns from its balance losses
only; Switch (arXiv 2101.03961) scales by the probability over all experts.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext, RouterStats, collect_stats
from moe_lab.routing.router import Router
from moe_lab.routing.selection import assign, rank_experts, router_logits


class TopK(Router):
  """The `topk` method; `config.k` experts per token."""

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = router_logits(x_TD, parameters["router_DE"])
    expert_TK = rank_experts(logits_TE, self.config.k, self.config.expert_dropout, context)
    count_T = jnp.full(x_TD.shape[0], self.config.k)
    if context.decisions.count_T is not None:
      count_T = context.decisions.count_T
    assignment = assign(logits_TE, expert_TK, count_T, context.mask_T)
    return assignment, collect_stats(logits_TE, assignment, context.mask_T, policy=None)
