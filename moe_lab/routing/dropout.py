"""Noise in training: expert dropout, gating dropout, jitter.

Expert dropout: whole experts leave the choice, the busier the likelier. No
expert can become a bottleneck that the model cannot do without, and tokens
learn their second-best experts.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext


def dropped_experts(key: jax.Array, load_E: jax.Array, rate: float, slots: int) -> jax.Array:
  """Draws which experts leave the choice in this step.

  Args:
    key: randomness; one draw serves the whole batch of a layer.
    load_E: share of the rows of each expert times E; the fair share is 1.
    rate: mean probability of leaving; an expert's own is rate * load, at most 0.9.
    slots: K; at least so many experts stay, the idler ones first.

  Returns:
    bool [E].
  """
  probability_E = jnp.clip(rate * load_E, 0.0, 0.9)
  margin_E = jax.random.uniform(key, load_E.shape) - probability_E  # below zero: leaves
  rank_E = jnp.argsort(jnp.argsort(margin_E))
  return (margin_E < 0) & (rank_E < load_E.shape[0] - slots)


def scattered(assignment: Assignment, num_experts: int, rate: float, context: RouterContext) -> Assignment:
  """Gating dropout: with probability `rate` all tokens of the layer go to other experts, drawn at random.

  Gating Dropout (arXiv 2205.14336) keeps tokens on their own device in some
  steps, whatever the router says. The device is chance to a token, and so are
  the experts here: each token's move on by a step of its own, which keeps them
  apart, their number and their gates. Replayed experts stay.
  """
  if rate == 0 or context.key is None or context.decisions.expert_TK is not None:
    return assignment
  when, where = jax.random.split(jax.random.fold_in(context.key, 2))
  move_T1 = jax.random.randint(where, (assignment.expert_TK.shape[0], 1), 0, num_experts)
  move_T1 = jnp.where(jax.random.bernoulli(when, rate), move_T1, 0)
  return assignment._replace(expert_TK=(assignment.expert_TK + move_T1) % num_experts)


def jittered(x_TD: jax.Array, size: float, context: RouterContext) -> jax.Array:
  """Returns what the router reads: in training x_TD times random factors from 1 - size to 1 + size."""
  if size == 0 or context.key is None:
    return x_TD
  factor_TD = jax.random.uniform(jax.random.fold_in(context.key, 3), x_TD.shape, minval=1 - size, maxval=1 + size)
  return x_TD * factor_TD.astype(x_TD.dtype)
