"""Learning the count policy by REINFORCE with a baseline (arXiv 2402.14740 for leave-one-out).

The reward of a decision at a token is minus the token's loss and, discounted,
the next tokens'. The price of experts is not part of the reward: its gradient
through the policy's mean count is known exactly, so it is not sampled.

With `leave_one_out` some sequences run twice in the same batch, with different
counts. Both rollouts share targets, so what is luck about a noisy token cancels
in their difference; a value head cannot know that luck.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import PolicyTerms


def credited_loss(nll_BL: jax.Array, weight_BL: jax.Array, segment_BL: jax.Array, discount: float) -> jax.Array:
  """Returns credit_BL: the token's loss plus discount times the credit of its successor in the document.

  Args:
    nll_BL: loss of predicting the next token at each position, in nats.
    weight_BL: 1 where that prediction counts, else 0.
    segment_BL: documents.
    discount: share that is handed one token back.
  """
  same_BL = jnp.pad(segment_BL[:, 1:] == segment_BL[:, :-1], ((0, 0), (0, 1)))
  decay_BL = discount * same_BL

  def join(later, earlier):
    return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

  return jax.lax.associative_scan(join, (decay_BL, nll_BL * weight_BL), axis=1, reverse=True)[1]


def leave_one_out_advantage(credit_BL: jax.Array, num_pairs: int) -> jax.Array:
  """Returns advantage_BL in nats: how much better a rollout did than its twin.

  The last `num_pairs` rows are second rollouts of the first; a row without a
  twin gets 0, that is, teaches nothing.
  """
  batch = credit_BL.shape[0]
  better_PL = credit_BL[batch - num_pairs :] - credit_BL[:num_pairs]
  alone = jnp.zeros((batch - 2 * num_pairs, credit_BL.shape[1]))
  return jnp.concatenate([better_PL, alone, -better_PL])


def policy_losses(
  terms: PolicyTerms,
  advantage_ZT: jax.Array,
  learns_T: jax.Array,
  mask_T: jax.Array,
  price: jax.Array,
  scale: jax.Array,
  entropy_floor: float,
) -> dict[str, jax.Array]:
  """Losses of the count policy, in units of `scale`.

  Args:
    terms: the policy's, [Z, T].
    advantage_ZT: in nats (or [T] if it is the same in all layers).
    learns_T: which tokens have an advantage.
    mask_T: which tokens are real.
    price: lambda, nats per expert; [] or [T].
    scale: size of the advantages, in nats.
    entropy_floor: nats, [] or [T]; each layer's mean entropy is pushed up to it.

  Returns:
    "policy" (sampled) and "price" and "entropy_floor" (exact).
  """
  learns_T, mask_T = learns_T.astype(jnp.float32), mask_T.astype(jnp.float32)
  scale = jnp.maximum(scale, 1e-6)
  gain_ZT = jax.lax.stop_gradient(advantage_ZT / scale) * terms.log_prob_T

  def mean(x_ZT, weight_T):
    return (x_ZT * weight_T).sum(-1) / jnp.maximum(weight_T.sum(), 1)

  return {
    "policy": -mean(gain_ZT, learns_T).mean(),
    "price": mean(jax.lax.stop_gradient(price / scale) * terms.expected_count_T, mask_T).mean(),
    "entropy_floor": jax.nn.relu(mean(entropy_floor - terms.entropy_T, mask_T)).mean(),
  }
