"""A context for a single layer's router."""

import jax
import jax.numpy as jnp
import pytest

from moe_lab.routing.base import Decisions, RouterContext, initial_router_state


@pytest.fixture
def make_context():
  """Returns make_context(num_tokens, num_experts, dim, **fields): no padding, budget 2, inference, nothing replayed."""

  def make(num_tokens, num_experts, dim=8, **fields):
    state = initial_router_state(1, num_experts)
    context = RouterContext(
      mask_T=jnp.ones(num_tokens, bool),
      budget_T=jnp.full(num_tokens, 2.0),
      embedding_TD=jnp.zeros((num_tokens, dim)),
      state=jax.tree.map(lambda leaf: leaf[0], state),
      key=None,
      decisions=Decisions(),
    )
    return context._replace(**fields)

  return make
