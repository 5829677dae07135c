"""Sequence top-k: a sequence has budget times length experts to spend, on its best (token, expert) pairs.

SeqTopK (arXiv 2511.06494): tokens compete with each other, so the count follows
the router's scores and the sequence's total is exact. Each token keeps k_min
and takes at most k_max. Not causal: later tokens compete too.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext, RouterStats
from moe_lab.routing.router import Router
from moe_lab.routing.selection import assign, replayed, take


def counts_of_best(score_BX: jax.Array, total_B: jax.Array, slots: int) -> jax.Array:
  """Returns count_T: how many of each token's K slots (X = L * K) are among its sequence's `total_B` best."""
  rank_BX = jnp.argsort(jnp.argsort(-score_BX, axis=1), axis=1)  # stable: of equal scores the earlier token's
  return (rank_BX < total_B[:, None]).reshape(-1, slots).sum(-1)


class SequenceTopK(Router):
  """The `sequence_topk` method."""

  causal = False

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    slots, rows = self.config.k_max, context.num_sequences
    logits_TE = self.logits(parameters, x_TD)
    expert_TK = self.ranked(logits_TE, context)
    score_TK = take(jax.nn.softmax(logits_TE, axis=-1), expert_TK)
    score_TK += jnp.arange(slots) < self.config.k_min  # probabilities are at most 1: these come first
    score_TK = jnp.where(context.mask_T[:, None], jax.lax.stop_gradient(score_TK), -1.0)
    total_B = jnp.round((context.budget_T * context.mask_T).reshape(rows, -1).sum(1)).astype(jnp.int32)
    count_T = counts_of_best(score_TK.reshape(rows, -1), total_B, slots)
    assignment = assign(logits_TE, expert_TK, replayed(count_T, context), context.mask_T, self.config.slot_gate)
    return assignment, self.stats(logits_TE, assignment, context)
