"""The training loss: next-token loss, balance, the routing method's own losses, and the count policy's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.config.schema import Config
from moe_lab.evaluate.drift import divergence
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.balance import balance_loss
from moe_lab.routing.budget_table import draw_budgets
from moe_lab.routing.learner import Rollouts, lesson, twin_rows
from moe_lab.routing.registry import make_router
from moe_lab.sharding.head import spread_head_loss
from moe_lab.train.metrics import from_stats
from moe_lab.train.state import TrainState
from moe_lab.types import Batch

BUDGET_STREAM = 1_000_003  # of the step's key, beside the layers' own


def num_twins(config: Config, batch_size: int) -> int:
  """P: how many sequences of a batch are rolled out twice."""
  return round(batch_size * config.routing.second_rollouts) if config.routing.two_rollouts else 0


def with_twins(batch: Batch, twins: int) -> Batch:
  """Appends second copies of the first `twins` sequences; they differ by their sampled counts alone."""
  return jax.tree.map(lambda rows: jnp.concatenate([rows, rows[:twins]]), batch)


class Inputs(NamedTuple):
  """A batch as the model reads it, twins included; letters as in `compute_loss`."""

  token_BL: jax.Array
  target_BL: jax.Array
  segment_BL: jax.Array
  weight_BL: jax.Array  # 1 where the prediction counts
  budget_B: jax.Array
  greedy_B: jax.Array | None  # rows that take the counts of inference
  num_twins: int


def inputs_of(batch: Batch, key: jax.Array, config: Config) -> Inputs:
  """Returns what the model reads of a batch; `key` is the step's, and draws the budgets."""
  rows, twins = batch.tokens.shape[0], num_twins(config, batch.tokens.shape[0])
  batch = with_twins(batch, twins)
  segment_BL = batch.segments[:, :-1]
  budget_B = draw_budgets(jax.random.fold_in(key, BUDGET_STREAM), rows, config.routing)
  return Inputs(
    token_BL=batch.tokens[:, :-1],
    target_BL=batch.tokens[:, 1:],
    segment_BL=segment_BL,
    weight_BL=batch.targets_BL.astype(jnp.float32),
    budget_B=jnp.concatenate([budget_B, budget_B[:twins]]),
    # The learner "greedy" has a second rollout by the rule of inference.
    greedy_B=jnp.arange(rows + twins) >= rows if twins and config.routing.learner == "greedy" else None,
    num_twins=twins,
  )


def compute_loss(
  params,
  state: TrainState,
  batch: Batch,
  key,
  config: Config,
  model: Transformer,
  earlier_ZE: jax.Array | float = 0.0,
  before=None,
):
  """Returns the total loss (float32 []) and the `Metrics` of one micro-batch.

  `earlier_ZE`: rows by expert of the step's micro-batches before this one. `before`: parameters of the model that the
  router is held to; None: to none.
  """
  routing = config.routing
  token_BL, target_BL, segment_BL, weight_BL, budget_B, greedy_B, twins = inputs_of(batch, key, config)
  if before is not None:
    model = model.clone(traced=True)
  inputs = (token_BL, segment_BL, budget_B, state.router_state)
  out = model.apply({"params": params}, *inputs, key=key, greedy_B=greedy_B)
  # A sequence counts once, however often it is rolled out.
  share_B1 = jnp.where(twin_rows(token_BL.shape[0], twins), 0.5, 1.0)[:, None]
  loss_sum, nll_BL = spread_head_loss(out.hidden_BLD, out.head_VD, target_BL, weight_BL * share_B1, model.mesh)
  loss_weight = jnp.sum(weight_BL * share_B1)
  total = loss_sum / jnp.maximum(loss_weight, 1)

  stats = out.stats
  router_losses = make_router(routing).losses(stats, state.router_state) | {
    "load_balance": (
      balance_loss(stats, routing.balance_scope, earlier_ZE),
      routing.load_balance_weight,
    ),
    "router_z": (jnp.mean(stats.z_sum / jnp.maximum(stats.token_count, 1)), routing.z_loss_weight),
  }
  if before is not None:
    # The same key: the two differ by their weights, not by luck.
    choice = model.apply({"params": before}, *inputs, key=key, greedy_B=greedy_B).stats.choice
    real_T = (segment_BL != 0).reshape(-1).astype(jnp.float32)
    kl_ZT = divergence(jax.lax.stop_gradient(choice), stats.choice)
    kl = (kl_ZT @ real_T).mean() / jnp.maximum(real_T.sum(), 1)
    router_losses["router_kl"] = (kl, config.adapt.router_kl_weight)
  losses = {name: loss for name, (loss, _) in router_losses.items()}
  total += sum(weight * loss for loss, weight in router_losses.values())

  square, count = jnp.zeros(()), jnp.zeros(())
  if stats.policy is not None:
    learning = state.step >= routing.warmup_steps
    rollouts = Rollouts(nll_BL, weight_BL, segment_BL, budget_B, twins)
    taught = lesson(stats.policy, rollouts, state.budget_state, learning, routing)
    total += taught.total
    losses |= taught.losses
    square, count = taught.advantage_square, taught.advantage_count
  real_BL = segment_BL != 0
  drawn_BL = real_BL if greedy_B is None else real_BL & ~greedy_B[:, None]
  budget_T, drawn_T, mask_T = (
    jnp.broadcast_to(x, token_BL.shape).reshape(-1).astype(jnp.float32) for x in (budget_B[:, None], drawn_BL, real_BL)
  )
  return total, from_stats(stats, budget_T, drawn_T, mask_T, routing, loss_sum, loss_weight, square, count, losses)
