"""Null experts: slots that cost nothing, so that top-k leaves each token its own number of real experts.

AdaMoE (arXiv 2406.13233) lets the K slots of a token choose among real and
null experts; the null ones give zero. LongCat-Flash (arXiv 2509.01322) and
MoE++ (arXiv 2410.07348) have some that give their input instead; of the latter,
constant experts and gating residuals are not here. A bias on the null experts'
scores, moved by a controller, holds the mean number of real ones: AdaMoE leaves
that to a balance loss over both kinds, LongCat-Flash to the biases of the real
experts. Null experts take no row of the dispatch.

K is k_max, real and null together. With "zero" the gates are a softmax over
those K, so null experts take their part away; AdaMoE renormalises over the real
ones, which lost quality here where counts vary (see `selection.assign`). With
"identity" they are a softmax over all experts of both kinds, as in
LongCat-Flash. `k_min = 0` lets a token have null experts only, as published.
"""

import jax
import jax.numpy as jnp

from moe_lab.config.schema import ModelConfig
from moe_lab.routing.base import Assignment, Observed, RouterContext, RouterState, RouterStats
from moe_lab.routing.budget_table import at
from moe_lab.routing.router import Router
from moe_lab.routing.selection import best, first_slots, replayed, router_logits, take
from moe_lab.routing.steering import initial_level, steered


def real_count(score_TK: jax.Array, null_TU: jax.Array) -> jax.Array:
  """Returns count_T: how many of a token's real experts (scores, best first) are among its K best of real and null."""
  slots = score_TK.shape[1]
  null_before_TK = (null_TU[:, None, :] > score_TK[:, :, None]).sum(-1)
  return (jnp.arange(slots) + null_before_TK < slots).sum(-1)


class NullExperts(Router):
  """The `null_experts` method: up to k_max real experts, where no null expert has a better score."""

  def parameters(self, model: ModelConfig):
    return super().parameters(model) | {"null_DU": ((model.dim, self.config.num_null_experts), model.dim**-0.5)}

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    slots, num_null = self.config.k_max, self.config.num_null_experts
    logits_TE = router_logits(x_TD, parameters["router_DE"])
    null_TU = router_logits(x_TD, parameters["null_DU"])
    score_TE = self.eligible(logits_TE, context)
    expert_TK = best(score_TE, slots, context)
    bias = jnp.broadcast_to(-at(context.state.method["level"], context.budget_T, self.config), x_TD.shape[:1])
    count_T = real_count(take(score_TE, expert_TK), jax.lax.stop_gradient(null_TU) + bias[:, None])
    count_T = replayed(jnp.clip(count_T, self.config.k_min, slots), context)

    total_T = jax.nn.logsumexp(jnp.concatenate([logits_TE, null_TU], axis=1), axis=-1)
    # The slots that real experts leave go to the best null ones, as far as there are any.
    null_TU = jax.lax.top_k(null_TU, min(slots, num_null))[0]
    null_TU = jnp.where(jnp.arange(null_TU.shape[1]) < (slots - count_T)[:, None], null_TU, -jnp.inf)
    real_TK = jnp.where(jnp.arange(slots) < count_T[:, None], take(logits_TE, expert_TK), -jnp.inf)
    chosen_TX = jnp.concatenate([real_TK, null_TU], axis=1)
    if self.config.null_output == "zero":
      total_T = jax.nn.logsumexp(chosen_TX, axis=-1)
    gate_TX = jnp.exp(chosen_TX - total_T[:, None])
    assignment = first_slots(gate_TX[:, :slots], expert_TK, count_T, context.mask_T)
    if self.config.null_output == "identity":
      assignment = assignment._replace(identity_T=gate_TX[:, slots:].sum(-1) * context.mask_T)
    return assignment, self.stats(logits_TE, assignment, context)

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    return initial_level(self.config, num_layers)

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    return steered(state.method, seen, self.config)
