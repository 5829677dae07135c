"""Expert dropout: in training whole experts leave the choice, the busier the likelier.

No expert can become a bottleneck that the model cannot do without, and tokens
learn their second-best experts.
"""

import jax
import jax.numpy as jnp


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
