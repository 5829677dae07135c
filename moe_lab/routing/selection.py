"""Which experts a token gets, once its count is known."""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext
from moe_lab.routing.dropout import dropped_experts


def router_logits(x_TD: jax.Array, router_DE: jax.Array) -> jax.Array:
  """Returns logits_TE in float32 whatever the activations' type."""
  return jnp.einsum("TD,DE->TE", x_TD.astype(jnp.float32), router_DE)


def rank_experts(logits_TE: jax.Array, slots: int, expert_dropout: float, context: RouterContext) -> jax.Array:
  """Returns expert_TK: each token's best experts in order.

  The order is by logit plus the balance bias (arXiv 2408.15664: the bias decides
  the choice, never the gate); experts dropped in this step come last.
  """
  if context.decisions.expert_TK is not None:
    return context.decisions.expert_TK
  score_TE = logits_TE + context.state.bias_E
  if expert_dropout > 0 and context.key is not None:
    dropped_E = dropped_experts(jax.random.fold_in(context.key, 1), context.state.load_E, expert_dropout, slots)
    score_TE = jnp.where(dropped_E, -jnp.inf, score_TE)
  return jax.lax.top_k(jax.lax.stop_gradient(score_TE), slots)[1]


def assign(logits_TE: jax.Array, expert_TK: jax.Array, count_T: jax.Array, mask_T: jax.Array) -> Assignment:
  """Gives each token its first `count_T` experts.

  The gates are a softmax over all K slots, whatever the count: one more expert
  adds its part and leaves the others' alone. Renormalising over the chosen
  rescales every part with the count, and models trained so lost from a fourth
  expert on (experiments/difficulty/LOG.md). With count K the gates sum to one.
  """
  slots = expert_TK.shape[1]
  valid_TK = (jnp.arange(slots) < count_T[:, None]) & mask_T[:, None]
  gate_TK = jax.nn.softmax(jnp.take_along_axis(logits_TE, expert_TK, axis=1), axis=-1)
  return Assignment(expert_TK, jnp.where(valid_TK, gate_TK, 0.0), valid_TK)
