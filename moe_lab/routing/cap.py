"""Upper bounds on what inference spends: a token's own cap, and the rows that all tokens of a batch share."""

import jax
import jax.numpy as jnp

from moe_lab.routing.base import Assignment, Caps


def shared(wanted_T: jax.Array, urgency_T: jax.Array, floor: int, rows: jax.Array) -> jax.Array:
  """Returns count_T: everybody's floor, then what is left of `rows` to the hardest tokens first.

  Args:
    wanted_T: int32, counts that the router chose. The more, the harder a token is taken to be.
    urgency_T: float32, decides among equal counts.
    floor: of each token, as far as it wants that many.
    rows: int32 [], rows to share.
  """
  least_T = jnp.minimum(wanted_T, floor)
  extra_T = wanted_T - least_T
  order_T = jnp.lexsort((-urgency_T, -wanted_T))
  before_T = jnp.cumsum(extra_T[order_T]) - extra_T[order_T]
  granted_T = jnp.clip(rows - least_T.sum() - before_T, 0, extra_T[order_T])
  return least_T.at[order_T].add(granted_T)


def capped(assignment: Assignment, caps: Caps, floor: int) -> Assignment:
  """Cuts each token's experts down to its cap, best first, and all tokens' to their rows.

  Gates stay as they are, also where a method shares them out over its own count.
  """
  wanted_T = assignment.valid_TK.sum(-1)
  count_T = jnp.minimum(wanted_T, caps.experts)
  slot_K = jnp.arange(assignment.valid_TK.shape[1])
  if caps.rows is not None:
    # Among equal counts: how much of its gates a token would lose.
    urgency_T = jnp.where((slot_K >= floor) & (slot_K < count_T[:, None]), assignment.gate_TK, 0.0).sum(-1)
    count_T = shared(count_T, urgency_T, floor, caps.rows)
  valid_TK = assignment.valid_TK & (slot_K < count_T[:, None])
  return assignment._replace(gate_TK=jnp.where(valid_TK, assignment.gate_TK, 0.0), valid_TK=valid_TK)
