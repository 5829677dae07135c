"""ReLU routing: the gates are ReLU of the router's logits, and a token takes every expert whose gate is not zero.

ReMoE (arXiv 2412.14711). An L1 loss on the gates, heavier on experts and layers
that are busier than the budget asks for, makes them sparse; its coefficient is
multiplied or divided by up to a constant each step, by whether more or fewer
gates are open than that. Nothing but the text's loss opens them again, so
other auxiliary losses are best left off, as published. Of more than k_max open
gates the largest are kept. `k_min` has no meaning here: an expert whose gate is
zero would give nothing.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, Observed, RouterContext, RouterState, RouterStats
from moe_lab.routing.budget_table import targets
from moe_lab.routing.router import Router, per_token
from moe_lab.routing.selection import best, first_slots, passing_count, replayed, router_logits, take

INITIAL_COEFFICIENT, FACTOR = 1e-8, 1.2  # as published
NEAR = 0.1  # relative error from which on the factor is whole; as published it is at any error, and chatters
# Nats per unit of gate. An L1 gradient that outweighs all others moves Adam no faster by being larger still; it only
# takes longer to come down from, while the gates go to zero.
MAX_COEFFICIENT = 0.1


class ReLU(Router):
  """The `relu` method."""

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    logits_TE = router_logits(x_TD, parameters["router_DE"])
    score_TE = self.eligible(logits_TE, context)
    expert_TK = best(score_TE, self.config.k_max, context)
    count_T = replayed(passing_count(take(score_TE, expert_TK), 0), context)
    gate_TE = jax.nn.relu(logits_TE)
    assignment = first_slots(take(gate_TE, expert_TK), expert_TK, count_T, context.mask_T)
    mask_T = context.mask_T.astype(jnp.float32)
    # Also those that k_max cuts off: they are to close.
    sums = {"gate_E": mask_T @ gate_TE, "open_E": mask_T @ (gate_TE > 0)}
    return assignment, self.stats(logits_TE, assignment, context, sums=sums)

  def losses(self, stats: RouterStats, state: RouterState):
    gate_ZE, open_ZE = (per_token(stats.sums[name], stats.token_count) for name in ("gate_E", "open_E"))
    busy_ZE = jax.lax.stop_gradient(open_ZE) * open_ZE.shape[1] / self.config.budget
    loss = (busy_ZE * gate_ZE).sum(-1).mean()
    return {"gate_l1": (loss, state.method["l1"].mean())}

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    return {"l1": jnp.full(num_layers, INITIAL_COEFFICIENT)}

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    open_ZE = per_token(seen.sums["open_E"], seen.token_count)
    error = open_ZE.sum(-1).mean() / targets(self.config) - 1
    return {"l1": jnp.clip(state.method["l1"] * FACTOR ** jnp.clip(error / NEAR, -1, 1), 1e-10, MAX_COEFFICIENT)}
