"""Expert choice: experts pick tokens, each the same number, so load is even by construction (arXiv 2202.09368).

An expert takes the tokens of the batch with the highest probability for it;
their number is the budget times tokens over experts. A token that many experts
pick keeps its k_max best; one that none picks has no expert (`k_min` has no
meaning here). Not causal: whether a token is picked hangs on all others,
the later ones too.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext, RouterStats
from moe_lab.routing.router import Router
from moe_lab.routing.selection import best, first_slots, replayed, router_logits, take


def picks(score_TE: jax.Array, total: jax.Array) -> jax.Array:
  """Returns bool [T, E]: each expert's best tokens, `total` picks in all, shared evenly among the experts."""
  experts = score_TE.shape[1]
  edge = total * jnp.arange(experts + 1) // experts
  rank_TE = jnp.argsort(jnp.argsort(-score_TE, axis=0), axis=0)
  return rank_TE < edge[1:] - edge[:-1]


class ExpertChoice(Router):
  """The `expert_choice` method."""

  causal = False

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = router_logits(x_TD, parameters["router_DE"])
    prob_TE = jax.nn.softmax(logits_TE, axis=-1)
    score_TE = jnp.where(context.mask_T[:, None], self.eligible(prob_TE, context), -jnp.inf)
    total = jnp.round(context.budget_T @ context.mask_T).astype(jnp.int32)
    picked_TE = picks(score_TE, total) & jnp.isfinite(score_TE)
    # Those who picked the token come first, then the rest.
    order_TE = jnp.where(picked_TE, score_TE + 1e3, score_TE)
    expert_TK = best(order_TE, self.config.k_max, context)
    count_T = replayed(jnp.minimum(picked_TE.sum(-1), self.config.k_max), context)
    assignment = first_slots(take(prob_TE, expert_TK), expert_TK, count_T, context.mask_T)
    return assignment, self.stats(logits_TE, assignment, context)
