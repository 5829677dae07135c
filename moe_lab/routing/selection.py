"""Which experts a token gets: the parts that routing methods are put together from."""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext
from moe_lab.routing.dropout import dropped_experts

SAME_LENGTH = ("softmax_unit", "softmax_kept")  # gates whose Euclidean length does not hang on the count
TINY = 1e-12  # square of gates too small to matter; padding has none


def router_logits(x_TD: jax.Array, router_DE: jax.Array) -> jax.Array:
  """Returns logits_TE in float32 whatever the activations' type."""
  return jnp.einsum("TD,DE->TE", x_TD.astype(jnp.float32), router_DE)


def standardised(logits_TE: jax.Array, log_scale: jax.Array) -> jax.Array:
  """Returns logits of mean 0 over the experts and of a learned deviation, 1 at the start (DTop-p, arXiv 2512.13996).

  How sharp the gates are then does not hang on how large the hidden state has become.
  """
  return jnp.exp(log_scale) * jax.nn.standardize(logits_TE, axis=-1)


def take(values_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """Returns the values of each token's experts."""
  return jnp.take_along_axis(values_TE, expert_TK, axis=1)


def in_best_groups(score_TE: jax.Array, num_groups: int, num_kept: int) -> jax.Array:
  """Returns bool [T, E]: whether an expert is in one of the token's best groups (group-limited routing).

  Neighbouring experts form a group, as they would share a device; a group is as
  good as the sum of its two best scores (DeepSeek-V3, arXiv 2412.19437, 2.1.2).
  """
  tokens, experts = score_TE.shape
  grouped = score_TE.reshape(tokens, num_groups, experts // num_groups)
  value_TG = jax.lax.top_k(grouped, min(2, experts // num_groups))[0].sum(-1)
  rank_TG = jnp.argsort(jnp.argsort(-value_TG, axis=1), axis=1)
  return jnp.repeat(rank_TG < num_kept, experts // num_groups, axis=1)


def eligible_scores(
  score_TE: jax.Array, slots: int, expert_dropout: float, context: RouterContext, groups: tuple[int, int] = (1, 1)
) -> jax.Array:
  """Returns what the choice goes by: the score plus the balance bias, -inf for experts that are not to be had.

  The bias decides the choice, never the gate (arXiv 2408.15664). Not to be had
  are experts dropped in this step, and those outside the token's best groups.

  Args:
    score_TE: larger is better.
    slots: K.
    expert_dropout: mean share of experts that are dropped in training.
    context: of the layer.
    groups: number of groups, and how many of them are open to a token.
  """
  score_TE = jax.lax.stop_gradient(score_TE) + context.state.bias_E
  if groups[1] < groups[0]:
    score_TE = jnp.where(in_best_groups(score_TE, *groups), score_TE, -jnp.inf)
  if expert_dropout > 0 and context.key is not None:
    dropped_E = dropped_experts(jax.random.fold_in(context.key, 1), context.state.load_E, expert_dropout, slots)
    score_TE = jnp.where(dropped_E, -jnp.inf, score_TE)
  return score_TE


def best(score_TE: jax.Array, slots: int, context: RouterContext) -> jax.Array:
  """Returns expert_TK: each token's best experts in order, or those to replay."""
  if context.decisions.expert_TK is not None:
    return context.decisions.expert_TK
  return jax.lax.top_k(score_TE, slots)[1]


def rank_experts(
  logits_TE: jax.Array, slots: int, expert_dropout: float, context: RouterContext, groups: tuple[int, int] = (1, 1)
) -> jax.Array:
  """Returns expert_TK: each token's best experts in order, by `eligible_scores`."""
  return best(eligible_scores(logits_TE, slots, expert_dropout, context, groups), slots, context)


def replayed(count_T: jax.Array, context: RouterContext) -> jax.Array:
  """Returns the counts to replay, if there are any; else `count_T`."""
  return count_T if context.decisions.count_T is None else context.decisions.count_T


def passing_count(score_TK: jax.Array, k_min: int) -> jax.Array:
  """Returns count_T: how many scores, best first, are above zero; at least `k_min` where so many can be had."""
  return jnp.maximum((score_TK > 0).sum(-1), k_min)


def first_slots(gate_TK: jax.Array, expert_TK: jax.Array, count_T: jax.Array, mask_T: jax.Array) -> Assignment:
  """Gives each token its first `count_T` experts, with the gates that are given; padding gets none."""
  valid_TK = (jnp.arange(expert_TK.shape[1]) < count_T[:, None]) & mask_T[:, None]
  return Assignment(expert_TK, jnp.where(valid_TK, gate_TK, 0.0), valid_TK)


def assign(
  logits_TE: jax.Array, expert_TK: jax.Array, count_T: jax.Array, mask_T: jax.Array, gate: str = "softmax_chosen"
) -> Assignment:
  """Gives each token its first `count_T` experts.

  Most gates do not depend on the count: one more expert adds its part and leaves the others' alone, and a token's
  output grows with its count. Under softmax_unit and softmax_kept it keeps its size: outputs of different experts are
  all but orthogonal, so the sum's length goes with that of the gates. Gates that sum to one shrink it with the count,
  and models trained so lost from a fourth expert on (experiments/difficulty/LOG.md).

  Args:
    logits_TE: of the router.
    expert_TK: best first.
    count_T: how many of them.
    mask_T: False for padding.
    gate: softmax_chosen (over the K slots; with count K the gates sum to one: Mixtral, arXiv 2401.04088) |
      softmax_all (over all experts: Switch, arXiv 2101.03961; with one expert the router learns through it) |
      softmax_unit (that, over its Euclidean length over the experts taken; with one expert the constant one) |
      softmax_kept (softmax_chosen, as long over the experts taken as over all K slots: for a model that was trained
      with K and is to do with fewer; experiments/retrofit/LOG.md) |
      sigmoid (scores divided by their sum over the K slots: DeepSeek-V3, arXiv 2412.19437).
  """
  if gate in ("softmax_chosen", "softmax_kept"):
    gate_TK = jax.nn.softmax(take(logits_TE, expert_TK), axis=-1)
  elif gate in ("softmax_all", "softmax_unit"):
    gate_TK = take(jax.nn.softmax(logits_TE, axis=-1), expert_TK)
  else:
    score_TK = jax.nn.sigmoid(take(logits_TE, expert_TK))
    gate_TK = score_TK / score_TK.sum(-1, keepdims=True)
  assignment = first_slots(gate_TK, expert_TK, count_T, mask_T)
  if gate in SAME_LENGTH:
    square_T1 = jnp.square(assignment.gate_TK).sum(-1, keepdims=True)
    wanted_T1 = jnp.square(gate_TK).sum(-1, keepdims=True) if gate == "softmax_kept" else 1.0
    scale_T1 = jnp.sqrt(wanted_T1) * jax.lax.rsqrt(jnp.maximum(square_T1, TINY))
    assignment = assignment._replace(gate_TK=assignment.gate_TK * scale_T1)
  return assignment
