"""What a training step reports: sums, so that steps and micro-batches add up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing import budget_table
from moe_lab.routing.base import Observed, RouterStats


class Metrics(NamedTuple):
  """Float32 sums. Router fields are [Z, ...] over the mixture-of-experts layers.

  Attributes:
    loss_sum, loss_weight: [], next-token loss in nats, and the targets it is summed over
      (a sequence that is rolled out twice counts half each time).
    token_count: [], tokens that went through the layers, second rollouts included.
    assigned_ZE: rows by expert.
    count_histogram_ZK1: tokens by number of experts.
    asked, realised_Z, greedy_Z: tokens and their sums of counts (taken, and by the greedy rule) by the budget they
      asked for: [] and [Z], or a `budget_table`'s [J] and [Z, J].
    greedy_count_Z: sum of what the greedy rule would have taken; 0 without a policy.
    router_entropy_Z, policy_entropy_Z: sums over tokens, nats.
    dropped_Z: rows lost for want of capacity.
    sums: the routing method's own, [Z, ...] by name.
    advantage_square, advantage_count: [], of the decisions that teach the policy.
    losses: auxiliary losses by name, one addend a step.
    steps, skipped: [], steps summed over, and those whose gradient was not finite.
    grad_norm, price, learning_rate: [], one addend a step.
  """

  loss_sum: jax.Array
  loss_weight: jax.Array
  token_count: jax.Array
  assigned_ZE: jax.Array
  count_histogram_ZK1: jax.Array
  asked: jax.Array
  realised_Z: jax.Array
  greedy_Z: jax.Array
  greedy_count_Z: jax.Array
  router_entropy_Z: jax.Array
  policy_entropy_Z: jax.Array
  dropped_Z: jax.Array
  sums: dict[str, jax.Array]
  advantage_square: jax.Array
  advantage_count: jax.Array
  losses: dict[str, jax.Array]
  steps: jax.Array
  skipped: jax.Array
  grad_norm: jax.Array
  price: jax.Array
  learning_rate: jax.Array

  def count_mean_Z(self) -> jax.Array:
    """Mean experts per token of each layer."""
    counts = jnp.arange(self.count_histogram_ZK1.shape[-1], dtype=jnp.float32)
    return self.count_histogram_ZK1 @ counts / jnp.maximum(self.token_count, 1)

  def greedy_mean_Z(self) -> jax.Array:
    """Mean experts per token of each layer under the greedy rule."""
    return self.greedy_count_Z / jnp.maximum(self.token_count, 1)


def from_stats(
  stats: RouterStats,
  budget_T,
  drawn_T,
  mask_T,
  config: RoutingConfig,
  loss_sum,
  loss_weight,
  advantage_square,
  advantage_count,
  losses,
) -> Metrics:
  """Metrics of one micro-batch; what only the step knows is zero.

  Of the tokens only those of `drawn_T`, whose counts are the router's own choice, go to its controllers.
  """
  zero = jnp.zeros(())
  policy = stats.policy
  share_T = (budget_table.shares(budget_T, config).T * drawn_T).T
  # A count beside the knot counts as what it would be at the knot.
  scaled_T = (share_T.T / budget_T).T * budget_table.knots(config)
  per_layer_zero = jnp.zeros(stats.count_T.shape[0])
  return Metrics(
    loss_sum=loss_sum,
    loss_weight=loss_weight,
    token_count=stats.token_count[0],
    assigned_ZE=stats.assigned_E,
    count_histogram_ZK1=stats.count_histogram_K1,
    asked=share_T.sum(0),
    realised_Z=stats.count_T @ scaled_T,
    greedy_Z=(jnp.zeros(stats.count_T.shape) if policy is None else policy.greedy_count_T) @ scaled_T,
    greedy_count_Z=per_layer_zero if policy is None else policy.greedy_count_T @ mask_T,
    router_entropy_Z=stats.entropy_sum,
    policy_entropy_Z=per_layer_zero if policy is None else policy.entropy_T @ mask_T,
    dropped_Z=stats.dropped_sum,
    sums=stats.sums,
    advantage_square=advantage_square,
    advantage_count=advantage_count,
    losses=losses,
    steps=zero,
    skipped=zero,
    grad_norm=zero,
    price=zero,
    learning_rate=zero,
  )


def observed(metrics: Metrics) -> Observed:
  """What a step's metrics tell the routing's controllers."""
  return Observed(
    asked=metrics.asked,
    count_mean=metrics.realised_Z / jnp.maximum(metrics.asked, 1e-6),
    greedy_mean=metrics.greedy_Z / jnp.maximum(metrics.asked, 1e-6),
    assigned_ZE=metrics.assigned_ZE,
    token_count=metrics.token_count,
    sums=metrics.sums,
    advantage_mean_square=metrics.advantage_square / jnp.maximum(metrics.advantage_count, 1),
  )


def merge(first: Metrics, second: Metrics) -> Metrics:
  """Sums two Metrics."""
  return jax.tree.map(jnp.add, first, second)


def summarise(metrics: Metrics) -> dict:
  """Turns sums into the plain numbers of a record in metrics.jsonl. Syncs with the device."""
  m = jax.tree.map(np.asarray, metrics)
  steps, tokens = max(float(m.steps), 1.0), max(float(m.token_count), 1.0)
  rows_Z1 = np.maximum(m.assigned_ZE.sum(-1, keepdims=True), 1)
  return {
    "loss": float(m.loss_sum / max(float(m.loss_weight), 1.0)),
    "mean_experts": float(np.mean(m.count_mean_Z())),
    "greedy_experts": float(np.mean(m.greedy_mean_Z())),
    "price": float(m.price) / steps,
    "policy_entropy": float(m.policy_entropy_Z.mean()) / tokens,
    "router_entropy": (m.router_entropy_Z / tokens).tolist(),
    "advantage": float(np.sqrt(m.advantage_square / max(float(m.advantage_count), 1.0))),
    "learning_rate": float(m.learning_rate) / steps,
    "grad_norm": float(m.grad_norm) / steps,
    "skipped": int(m.skipped),
    "dropped": float(m.dropped_Z.sum() / max(float(m.assigned_ZE.sum()), 1.0)),
    "mean_experts_by_layer": np.asarray(m.count_mean_Z()).tolist(),
    "k_histogram": (m.count_histogram_ZK1 / tokens).tolist(),
    "load": (m.assigned_ZE / rows_Z1).tolist(),
    **{f"loss_{name}": float(value) / steps for name, value in m.losses.items()},
  }
