"""The training loss: next-token loss, balance, and the count policy's own losses."""

import jax
import jax.numpy as jnp

from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.ops.cross_entropy import weighted_head_loss
from moe_lab.routing import budget as budget_control
from moe_lab.routing.balance import load_balance_loss
from moe_lab.routing.count_policy import budget_log_prior, entropy
from moe_lab.routing.policy_gradient import credited_loss, leave_one_out_advantage, policy_losses
from moe_lab.train.metrics import from_stats
from moe_lab.train.state import TrainState
from moe_lab.types import Batch

ENTROPY_FLOOR_WEIGHT = 5.0  # in units of the advantage's scale: stronger than any usual price


def num_twins(config: Config, batch_size: int) -> int:
  """P: how many sequences of a batch are rolled out twice."""
  pairs = config.routing.method == "dynamic" and config.routing.baseline == "leave_one_out"
  return round(batch_size * config.routing.second_rollouts) if pairs else 0


def with_twins(batch: Batch, twins: int) -> Batch:
  """Appends second copies of the first `twins` sequences; they differ by their sampled counts alone."""
  return Batch(*(jnp.concatenate([rows, rows[:twins]]) for rows in batch))


def compute_loss(params, state: TrainState, batch: Batch, key, config: Config, model: Transformer):
  """Returns the total loss (float32 []) and the `Metrics` of one micro-batch."""
  routing = config.routing
  twins = num_twins(config, batch.tokens.shape[0])
  rows = batch.tokens.shape[0]
  batch = with_twins(batch, twins)
  token_BL, target_BL = batch.tokens[:, :-1], batch.tokens[:, 1:]
  segment_BL = batch.segments[:, :-1]
  weight_BL = ((segment_BL == batch.segments[:, 1:]) & (segment_BL != 0)).astype(jnp.float32)

  budget_B = jnp.full(token_BL.shape[0], routing.budget)
  out = model.apply({"params": params}, token_BL, segment_BL, budget_B, state.router_state, key=key)
  # A sequence counts once, however often it is rolled out.
  row_B = jnp.arange(token_BL.shape[0])
  share_B1 = jnp.where((row_B < twins) | (row_B >= rows), 0.5, 1.0)[:, None]
  loss_sum, nll_T = weighted_head_loss(
    out.hidden_BLD.reshape(token_BL.size, -1),
    out.head_VD,
    target_BL.reshape(-1),
    (weight_BL * share_B1).reshape(-1),
  )
  nll_BL, loss_weight = nll_T.reshape(token_BL.shape), jnp.sum(weight_BL * share_B1)
  total = loss_sum / jnp.maximum(loss_weight, 1)

  stats = out.stats
  losses, square, count = {}, jnp.zeros(()), jnp.zeros(())
  losses["load_balance"] = load_balance_loss(stats.assigned_E, stats.prob_sum_E, stats.token_count)
  losses["router_z"] = jnp.mean(stats.z_sum / jnp.maximum(stats.token_count, 1))
  total += routing.load_balance_weight * losses["load_balance"] + routing.z_loss_weight * losses["router_z"]

  if stats.policy is not None:
    credit_BL = credited_loss(jax.lax.stop_gradient(nll_BL), weight_BL, segment_BL, routing.credit_discount)
    if routing.baseline == "leave_one_out":
      advantage_ZT = leave_one_out_advantage(credit_BL, twins).reshape(-1)
      learns_BL = weight_BL * (share_B1 < 1)
    else:
      error_ZT = stats.policy.value_T - credit_BL.reshape(-1)
      losses["value"] = jnp.sum(jnp.square(error_ZT).mean(0) * weight_BL.reshape(-1)) / jnp.maximum(weight_BL.sum(), 1)
      total += losses["value"]
      advantage_ZT, learns_BL = jax.lax.stop_gradient(error_ZT), weight_BL
    learns_T = learns_BL.reshape(-1)
    square, count = jnp.sum(jnp.square(advantage_ZT).reshape(-1, learns_T.size).mean(0) * learns_T), learns_T.sum()
    floor = routing.entropy_floor * entropy(budget_log_prior(budget_B[:1], routing.k_min, routing.k_max))[0]
    policy = policy_losses(
      stats.policy,
      advantage_ZT,
      learns_T,
      (segment_BL != 0).reshape(-1),
      budget_control.price(state.budget_state, routing),
      state.budget_state.scale,
      floor,
    )
    policy["entropy_floor"] *= ENTROPY_FLOOR_WEIGHT
    learning = state.step >= routing.warmup_steps
    total += jnp.where(learning, sum(policy.values()), 0.0)
    losses |= policy
  return total, from_stats(stats, loss_sum, loss_weight, square, count, losses)
