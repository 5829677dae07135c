"""Dynamic routing: a policy decides token by token how many experts to spend.

The policy reads the hidden state without gradient into the trunk and is
trained by `policy_gradient.py`; which experts serve is fixed top-k's choice.
The nearest published relative is Ada-K (arXiv 2410.10456), which trains such
an allocator by PPO on a frozen model.
"""

import jax
import jax.numpy as jnp

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.routing import budget as budget_control
from moe_lab.routing.base import (
  Assignment,
  Observed,
  PolicyTerms,
  RouterContext,
  RouterState,
  RouterStats,
)
from moe_lab.routing.budget import BudgetState
from moe_lab.routing.budget_table import at
from moe_lab.routing.count_policy import budget_log_prior, calibrated_shift, entropy, expected_count, greedy_count
from moe_lab.routing.router import Router
from moe_lab.routing.selection import assign, replayed

WITH_VALUE_HEAD = ("value", "ppo")
TEMPERATURE = 1.0  # of the relaxed counts
POLICY_WIDTH = 32  # hidden units of the policy and of the value head


def head(parameters, name: str, features_TD):
  """Returns a small network's outputs; its parameters are NAME_in, NAME_bias, NAME_out."""
  hidden = jax.nn.silu(features_TD @ parameters[f"{name}_in"] + parameters[f"{name}_bias"])
  return hidden @ parameters[f"{name}_out"]


def policy_features(x_TD: jax.Array, context: RouterContext, config: RoutingConfig) -> jax.Array:
  """Returns what the policy reads: the hidden state (or the token's embedding), without gradient, and the budget."""
  seen_TD = x_TD if config.policy_input == "hidden" else context.embedding_TD
  budget_T1 = context.budget_T[:, None] / config.k_max
  return jnp.concatenate([jax.lax.stop_gradient(seen_TD).astype(jnp.float32), budget_T1], axis=1)


def with_soft_count(assignment: Assignment, perturbed_TA: jax.Array, k_min: int, learning: jax.Array) -> Assignment:
  """Lets the loss reach the count: the non-RL control (straight-through Gumbel-softmax, arXiv 1611.01144).

  Values stay; the gate of slot j gets the gradient of the relaxed probability
  that the count is more than j. Experts that were not taken are not computed,
  so what they would have been worth teaches nothing.

  Args:
    assignment: by a sampled count.
    perturbed_TA: log-probabilities of the counts plus Gumbel noise.
    k_min: the first count.
    learning: bool [], whether the warm-up is over; before, nothing reaches the count.
  """
  relaxed_TA = jax.nn.softmax(perturbed_TA / TEMPERATURE, axis=-1)
  slot_K, count_A = jnp.arange(assignment.expert_TK.shape[1]), k_min + jnp.arange(perturbed_TA.shape[1])
  more_TK = relaxed_TA @ (count_A[:, None] > slot_K).astype(jnp.float32)
  more_TK = jnp.where(learning, more_TK, 0.0)
  return assignment._replace(gate_TK=assignment.gate_TK * (1 + more_TK - jax.lax.stop_gradient(more_TK)))


class Dynamic(Router):
  """The `dynamic` method: k_min..k_max experts per token, `budget` on average."""

  def parameters(self, model: ModelConfig):
    features = model.dim + 1  # the hidden state and the budget
    shapes = super().parameters(model)
    heads = {"policy": self.config.k_max - self.config.k_min + 1}
    if self.config.learner in WITH_VALUE_HEAD:
      heads["value"] = 1
    for name, width in heads.items():
      shapes[f"{name}_in"] = ((features, POLICY_WIDTH), features**-0.5)
      shapes[f"{name}_bias"] = ((POLICY_WIDTH,), 0.0)
      shapes[f"{name}_out"] = ((POLICY_WIDTH, width), 0.0)
    return shapes

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    k_min, k_max = self.config.k_min, self.config.k_max
    logits_TE = self.logits(parameters, x_TD)
    expert_TK = self.ranked(logits_TE, context)

    features = policy_features(x_TD, context, self.config)
    log_prob_TA = jax.nn.log_softmax(
      head(parameters, "policy", features) + budget_log_prior(context.budget_T, k_min, k_max), axis=-1
    )
    expected_T = expected_count(log_prob_TA, k_min)
    shift = at(context.state.count_shift, context.budget_T, self.config)
    count_T = greedy_T = greedy_count(expected_T, shift, k_min, k_max)
    if context.key is not None:
      noise_TA = jax.random.gumbel(jax.random.fold_in(context.key, 0), log_prob_TA.shape)
      count_T = k_min + jnp.argmax(log_prob_TA + noise_TA, axis=-1)
    if context.greedy_T is not None:
      count_T = jnp.where(context.greedy_T, greedy_T, count_T)
    count_T = replayed(count_T, context)

    policy = PolicyTerms(
      log_prob_T=jnp.take_along_axis(log_prob_TA, jnp.clip(count_T - k_min, 0, k_max - k_min)[:, None], axis=1)[:, 0],
      expected_count_T=expected_T,
      entropy_T=entropy(log_prob_TA),
      greedy_count_T=greedy_T.astype(jnp.float32),
      value_T=head(parameters, "value", features)[:, 0] if self.config.learner in WITH_VALUE_HEAD else None,
    )
    assignment = assign(logits_TE, expert_TK, count_T, context.mask_T, self.config.slot_gate)
    if self.config.learner == "straight_through" and context.key is not None:
      learning = context.state.method["steps"] >= self.config.warmup_steps
      assignment = with_soft_count(assignment, log_prob_TA + noise_TA, k_min, learning)
    return assignment, self.stats(logits_TE, assignment, context, policy)

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    # Only here does the forward pass itself teach, and so has to know of the warm-up.
    return {"steps": jnp.zeros(num_layers)} if self.config.learner == "straight_through" else {}

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    return {name: steps + 1 for name, steps in state.method.items()}

  def updated_state(self, state: RouterState, seen: Observed) -> RouterState:
    shift_Z = calibrated_shift(state.count_shift, seen.count_mean, seen.greedy_mean, self.config)
    shift_Z = jnp.where(seen.asked > 0, shift_Z, state.count_shift)
    return super().updated_state(state, seen)._replace(count_shift=shift_Z)

  def price(self, state: RouterState, budget_state: BudgetState) -> jax.Array:
    return at(budget_control.price(budget_state, self.config), jnp.full(1, self.config.budget), self.config).mean()

  def updated_budget(self, state: BudgetState, seen: Observed, step: jax.Array) -> BudgetState:
    scale = budget_control.updated_scale(state.scale, seen.advantage_mean_square)
    # At a budget that nobody asked for in this step the mean stays what it was.
    mean = jnp.where(seen.asked > 0, seen.count_mean.mean(0), state.mean)
    moved = budget_control.updated(state, self.config, mean, scale)
    # In the warm-up no price could move the counts; integrating then would wind the controller up.
    learning = step >= self.config.warmup_steps
    return jax.tree.map(lambda new, old: jnp.where(learning, new, old), moved, state._replace(scale=scale))
