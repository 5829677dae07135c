"""What a batch of rollouts teaches the count policy, by the learner that the configuration names."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing import budget as budget_control
from moe_lab.routing import budget_table
from moe_lab.routing.base import PolicyTerms
from moe_lab.routing.budget import BudgetState
from moe_lab.routing.count_policy import budget_log_prior, entropy
from moe_lab.routing.policy_gradient import credited_loss, leave_one_out_advantage, policy_losses

ENTROPY_FLOOR_WEIGHT = 5.0  # in units of the advantage's scale: stronger than any usual price

CLIP = 0.2  # of PPO's ratio
STRAIGHT_THROUGH_SCALE = 0.1  # nats: the price's unit where no advantage gives one


class Rollouts(NamedTuple):
  """A batch as it went through the model.

  Attributes:
    nll_BL: float32, nats.
    weight_BL: 1 where the prediction counts.
    segment_BL: documents; 0 is padding.
    budget_B: the mean count that was asked for.
    num_twins: P; the last P rows are second rollouts of the first P.
  """

  nll_BL: jax.Array
  weight_BL: jax.Array
  segment_BL: jax.Array
  budget_B: jax.Array
  num_twins: int


def twin_rows(num_rows: int, num_twins: int) -> jax.Array:
  """Returns bool [B]: whether a row of a batch with twins is one of two rollouts."""
  row_B = jnp.arange(num_rows)
  return (row_B < num_twins) | (row_B >= num_rows - num_twins)


class Lesson(NamedTuple):
  """What the rollouts teach.

  Attributes:
    total: [], what is added to the training loss.
    losses: its parts by name.
    advantage_square, advantage_count: [], sums over the decisions that teach, nats squared and decisions.
  """

  total: jax.Array
  losses: dict[str, jax.Array]
  advantage_square: jax.Array
  advantage_count: jax.Array


def _policy_losses(
  terms: PolicyTerms, advantage_ZT, learns_T, rollouts: Rollouts, state: BudgetState, config: RoutingConfig
) -> dict[str, jax.Array]:
  """Returns `policy_losses` at the price and with the floor of each sequence's budget."""
  length, budget_B = rollouts.nll_BL.shape[1], rollouts.budget_B
  floor_B = config.entropy_floor * entropy(budget_log_prior(budget_B, config.k_min, config.k_max))
  price_B = jnp.broadcast_to(budget_table.at(budget_control.price(state, config), budget_B, config), budget_B.shape)
  mask_T = (rollouts.segment_BL != 0).reshape(-1)
  losses = policy_losses(
    terms, advantage_ZT, learns_T, mask_T, price_B.repeat(length), state.scale, floor_B.repeat(length)
  )
  return losses | {"entropy_floor": ENTROPY_FLOOR_WEIGHT * losses["entropy_floor"]}


def lesson(
  terms: PolicyTerms, rollouts: Rollouts, state: BudgetState, learning: jax.Array, config: RoutingConfig
) -> Lesson:
  """Returns the learner's losses.

  Args:
    terms: the policy's, [Z, T].
    rollouts: of the same tokens.
    state: of the budget controller.
    learning: bool [], whether the warm-up is over; a value head learns from the first step.
    config: names the learner.
  """
  losses, total = {}, jnp.zeros(())
  if config.learner == "curvature":  # its head learns in the backward pass
    return Lesson(total, losses, jnp.zeros(()), jnp.zeros(()))
  weight_BL, segment_BL = rollouts.weight_BL, rollouts.segment_BL
  credit_BL = credited_loss(jax.lax.stop_gradient(rollouts.nll_BL), weight_BL, segment_BL, config.credit_discount)
  unit = jnp.ones(())
  if config.learner in ("leave_one_out", "greedy"):
    advantage_ZT = leave_one_out_advantage(credit_BL, rollouts.num_twins).reshape(-1)
    twin_B = twin_rows(weight_BL.shape[0], rollouts.num_twins)
    if config.learner == "greedy":  # the second rollouts were not sampled and teach nothing
      twin_B &= jnp.arange(twin_B.size) < rollouts.num_twins
    learns_BL = weight_BL * twin_B[:, None]
  elif config.learner == "none":
    advantage_ZT, learns_BL = -credit_BL.reshape(-1), weight_BL
  elif config.learner == "straight_through":
    # What teaches is the text's own loss, in nats; so is then the price.
    advantage_ZT, learns_BL, unit = jnp.full(weight_BL.size, STRAIGHT_THROUGH_SCALE), weight_BL, state.scale
  else:
    error_ZT = terms.value_T - credit_BL.reshape(-1)
    losses["value"] = jnp.sum(jnp.square(error_ZT).mean(0) * weight_BL.reshape(-1)) / jnp.maximum(weight_BL.sum(), 1)
    total += losses["value"]
    advantage_ZT, learns_BL = jax.lax.stop_gradient(error_ZT), weight_BL
  learns_T = learns_BL.reshape(-1)
  policy = _policy_losses(terms, advantage_ZT, learns_T, rollouts, state, config)
  square = jnp.sum(jnp.square(advantage_ZT).reshape(-1, learns_T.size).mean(0) * learns_T)
  if config.learner == "straight_through":
    del policy["policy"]
  total += jnp.where(learning, unit * sum(policy.values()), 0.0)
  return Lesson(total, losses | policy, square, learns_T.sum())


def clipped_lesson(
  terms: PolicyTerms, old: PolicyTerms, rollouts: Rollouts, state: BudgetState, config: RoutingConfig
) -> jax.Array:
  """Returns PPO's loss (float32 []): the ratio of new to old probability is clipped (arXiv 1707.06347, eq. 7).

  Args:
    terms: the policy's now, for the decisions of the rollout, [Z, T].
    old: when it made them; its value head is the baseline.
    rollouts: what came of them.
    state: of the budget controller.
    config: of routing.
  """
  weight_T = rollouts.weight_BL.reshape(-1)
  credit_T = credited_loss(
    jax.lax.stop_gradient(rollouts.nll_BL), rollouts.weight_BL, rollouts.segment_BL, config.credit_discount
  ).reshape(-1)
  gain_ZT = jax.lax.stop_gradient((old.value_T - credit_T) / jnp.maximum(state.scale, 1e-6))
  ratio_ZT = jnp.exp(terms.log_prob_T - jax.lax.stop_gradient(old.log_prob_T))
  surrogate_ZT = jnp.minimum(ratio_ZT * gain_ZT, jnp.clip(ratio_ZT, 1 - CLIP, 1 + CLIP) * gain_ZT)

  def mean(x_ZT):
    return (x_ZT * weight_T).sum(-1).mean() / jnp.maximum(weight_T.sum(), 1)

  exact = _policy_losses(terms, gain_ZT, weight_T, rollouts, state, config)
  value = mean(jnp.square(terms.value_T - credit_T))
  return value - mean(surrogate_ZT) + exact["price"] + exact["entropy_floor"]
