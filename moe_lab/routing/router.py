"""What every routing method is: a choice of experts, and what it carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.routing import balance
from moe_lab.routing.base import (
  Assignment,
  Choice,
  Observed,
  PolicyTerms,
  RouterContext,
  RouterState,
  RouterStats,
  collect_stats,
  initial_router_state,
)
from moe_lab.routing.budget import BudgetState
from moe_lab.routing.budget_table import table_shape
from moe_lab.routing.selection import best, eligible_scores, router_logits, standardised


@dataclasses.dataclass(frozen=True)
class Router:
  """A routing method. It says what it needs; the model and the training step know no method by name.

  Attributes:
    config: of routing.
    causal: whether a token's experts depend on it and the tokens before it only. Others cannot decode, and
      their held-out loss says less, since the choice has seen the targets.
  """

  config: RoutingConfig
  causal = True

  def parameters(self, model: ModelConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Names the parameters of one layer: shape and standard deviation at the start (0: zeros)."""
    scale = {"log_scale": ((1,), 0.0)} if self.config.standardised else {}
    return {"router_DE": ((model.dim, model.num_experts), model.dim**-0.5)} | scale

  def __call__(
    self, parameters: dict[str, jax.Array], x_TD: jax.Array, context: RouterContext
  ) -> tuple[Assignment, RouterStats]:
    """Routes the tokens of one layer."""
    raise NotImplementedError

  def logits(self, parameters: dict[str, jax.Array], x_TD: jax.Array) -> jax.Array:
    """Returns logits_TE, float32; `standardised` where the configuration says so."""
    logits_TE = router_logits(x_TD, parameters["router_DE"])
    return standardised(logits_TE, parameters["log_scale"]) if self.config.standardised else logits_TE

  def eligible(self, score_TE: jax.Array, context: RouterContext) -> jax.Array:
    """Returns what the choice of experts goes by; see `eligible_scores`."""
    groups = (self.config.expert_groups, self.config.groups_kept)
    return eligible_scores(score_TE, self.config.slots, self.config.expert_dropout, context, groups)

  def ranked(self, logits_TE: jax.Array, context: RouterContext) -> jax.Array:
    """Returns expert_TK: each token's best experts in order, by logit, or by sigmoid score where that is the gate."""
    score_TE = jax.nn.sigmoid(logits_TE) if self.config.slot_gate == "sigmoid" else logits_TE
    return best(self.eligible(score_TE, context), self.config.slots, context)

  def stats(
    self,
    logits_TE: jax.Array,
    assignment: Assignment,
    context: RouterContext,
    policy: PolicyTerms | None = None,
    sums: dict[str, jax.Array] | None = None,
  ) -> RouterStats:
    """Returns the layer's statistics, each token's choice among them."""
    balance_TE = None
    if self.config.slot_gate == "sigmoid":
      score_TE = jax.nn.sigmoid(logits_TE)
      balance_TE = score_TE / score_TE.sum(-1, keepdims=True)
    num_sequences = context.num_sequences if self.config.balance_scope == "sequence" else None
    stats = collect_stats(logits_TE, assignment, context.mask_T, policy, sums, balance_TE, num_sequences)
    return stats._replace(choice=Choice(logits_TE, assignment.expert_TK, assignment.valid_TK))

  def losses(self, stats: RouterStats, state: RouterState) -> dict[str, tuple[jax.Array, jax.Array | float]]:
    """Names the method's own losses: value (float32 []) and weight. `stats` and `state` are [Z, ...]."""
    return {}

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    """Returns the method's own part of an untrained model's state, [Z, ...]."""
    return {}

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    """Returns the method's own part of the state after a step."""
    return state.method

  def initial_state(self, num_layers: int, num_experts: int) -> RouterState:
    """Returns the [Z, ...] state of an untrained model."""
    state = initial_router_state(num_layers, num_experts)
    shift = jnp.zeros((num_layers, *table_shape(self.config)))
    return state._replace(count_shift=shift, method=self.method_state(num_layers, num_experts))

  def updated_state(self, state: RouterState, seen: Observed) -> RouterState:
    """Returns the [Z, ...] state after a step: balance, and the method's own."""
    bias_ZE = state.bias_E
    if self.config.bias_update_rate > 0:
      bias_ZE = balance.updated_bias(bias_ZE, seen.assigned_ZE, self.config.bias_update_rate)
    return state._replace(
      bias_E=bias_ZE,
      load_E=balance.updated_load(state.load_E, seen.assigned_ZE),
      method=self.updated_method_state(state, seen),
    )

  def updated_budget(self, state: BudgetState, seen: Observed, step: jax.Array) -> BudgetState:
    """Returns the price controller's state after a step; it rests where nothing has a price."""
    return state

  def price(self, state: RouterState, budget_state: BudgetState) -> jax.Array:
    """Returns what an expert costs at the configured budget, [] nats; 0 where nothing has a price."""
    return jnp.zeros(())


def per_token(total: jax.Array, token_count: jax.Array) -> jax.Array:
  """Returns the mean over tokens of a sum [Z, ...] over `token_count` ([] or [Z])."""
  count = jnp.maximum(token_count, 1)
  return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))
