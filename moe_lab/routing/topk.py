"""Fixed top-k routing: every token gets its k best experts.

The softmax over the chosen with k = 2 is Mixtral (arXiv 2401.04088). With k = 1
it is the constant one, through which the router learns from its balance losses
only; Switch (arXiv 2101.03961) is k = 1 with a gate over all experts. DeepSeekMoE
(arXiv 2401.06066) is small experts and `model.num_shared_experts`, DeepSeek-V3
(arXiv 2412.19437) that with `gate = sigmoid`, `expert_groups` and a balance bias.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext, RouterStats
from moe_lab.routing.router import Router
from moe_lab.routing.selection import assign, replayed


class TopK(Router):
  """The `topk` method; `config.k` experts per token."""

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = self.logits(parameters, x_TD)
    count_T = replayed(jnp.full(x_TD.shape[0], self.config.k), context)
    expert_TK = self.ranked(logits_TE, context)
    assignment = assign(logits_TE, expert_TK, count_T, context.mask_T, self.config.slot_gate)
    return assignment, self.stats(logits_TE, assignment, context)
