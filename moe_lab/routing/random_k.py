"""Random counts: the control that tells what a policy's judgement is worth.

Counts are drawn as the dynamic method's untrained policy draws them, from the
distribution of most entropy whose mean is the budget (Matryoshka MoE, arXiv
2509.26520, trains so), or from given shares, such as the histogram of a trained
policy. At inference too: a token's draw is then a hash of its hidden state, so
that it needs no key and no neighbours. The last bit of that state is enough to
change it: another machine, or another batch, draws anew.
"""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, RouterContext, RouterStats
from moe_lab.routing.count_policy import budget_log_prior
from moe_lab.routing.router import Router
from moe_lab.routing.selection import assign, replayed


def hash_uniform(x_TD: jax.Array) -> jax.Array:
  """Returns uniform_T in [0, 1): float32, the same for the same hidden state."""
  bits_TD = jax.lax.bitcast_convert_type(x_TD.astype(jnp.float32), jnp.uint32)
  odd_D = 2 * jnp.arange(x_TD.shape[1], dtype=jnp.uint32) + 1
  hash_T = (bits_TD * (odd_D * jnp.uint32(0x9E3779B1))).sum(-1, dtype=jnp.uint32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser
    hash_T = (hash_T ^ (hash_T >> shift)) * jnp.uint32(factor)
  return (hash_T >> 8).astype(jnp.float32) / 2**24


class RandomK(Router):
  """The `random_k` method: k_min..k_max experts per token, at random, `budget` on average."""

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    k_min, k_max = self.config.k_min, self.config.k_max
    logits_TE = self.logits(parameters, x_TD)
    expert_TK = self.ranked(logits_TE, context)
    if self.config.count_shares:
      shares_A = jnp.asarray(self.config.count_shares)
      share_TA = jnp.broadcast_to(shares_A / shares_A.sum(), (x_TD.shape[0], k_max - k_min + 1))
    else:
      share_TA = jnp.exp(budget_log_prior(context.budget_T, k_min, k_max))
    if context.key is not None:
      uniform_T = jax.random.uniform(jax.random.fold_in(context.key, 0), x_TD.shape[:1])
    else:
      uniform_T = hash_uniform(x_TD)
    count_T = k_min + (uniform_T[:, None] >= jnp.cumsum(share_TA, axis=1)[:, :-1]).sum(-1)
    assignment = assign(logits_TE, expert_TK, replayed(count_T, context), context.mask_T, self.config.slot_gate)
    return assignment, self.stats(logits_TE, assignment, context)
