"""The dynamic router: what reaches what, replay, and the budget as an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.routing.base import Decisions
from moe_lab.routing.count_policy import budget_log_prior
from moe_lab.routing.dynamic import Dynamic

TOKENS, MODEL = 400, ModelConfig(dim=8, num_experts=6)


def parts(policy_out=0.0, **fields):
  router = Dynamic(RoutingConfig(k_max=4, **fields))
  keys = iter(jax.random.split(jax.random.key(0), 20))
  parameters = {n: jax.random.normal(next(keys), s) * std for n, (s, std) in router.parameters(MODEL).items()}
  parameters["policy_out"] = policy_out * jax.random.normal(next(keys), parameters["policy_out"].shape)
  return router, parameters, jax.random.normal(next(keys), (TOKENS, MODEL.dim))


def test_untrained_counts_are_random_and_hold_the_budget(make_context):
  router, parameters, x_TD = parts()
  context = make_context(TOKENS, 6)._replace(key=jax.random.key(1), budget_T=jnp.full(TOKENS, 1.5))
  assignment, stats = router(parameters, x_TD, context)
  assert stats.count_T.mean() == pytest.approx(1.5, abs=0.12)  # 400 draws of standard deviation 0.8
  np.testing.assert_array_equal(assignment.valid_TK.sum(1), stats.count_T)
  np.testing.assert_allclose(stats.policy.expected_count_T, 1.5, atol=2e-3)
  assert stats.count_histogram_K1.sum() == TOKENS and stats.assigned_E.sum() == stats.count_T.sum()


def test_replayed_counts_are_taken_and_their_probability_is_reported(make_context):
  router, parameters, x_TD = parts(policy_out=1.0)
  context = make_context(TOKENS, 6)
  total = 0.0
  for count in range(1, 5):
    replay = context._replace(decisions=Decisions(count_T=jnp.full(TOKENS, count)))
    assignment, stats = router(parameters, x_TD, replay)
    assert (assignment.valid_TK.sum(1) == count).all()
    total += jnp.exp(stats.policy.log_prob_T)
  np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_a_larger_budget_gives_larger_counts(make_context):
  router, parameters, x_TD = parts(policy_out=0.3)
  means = []
  for budget in (1.2, 2.0, 3.5):
    _, stats = router(parameters, x_TD, make_context(TOKENS, 6)._replace(budget_T=jnp.full(TOKENS, budget)))
    means.append(float(stats.policy.expected_count_T.mean()))
  assert means[0] < means[1] < means[2]
  np.testing.assert_allclose(budget_log_prior(jnp.asarray([2.5]), 1, 4), np.log(0.25), atol=1e-3)  # the middle: uniform


@pytest.mark.parametrize("policy_input", ["hidden", "token"])
def test_the_policy_reads_what_it_should_and_teaches_nothing_but_itself(make_context, policy_input):
  router, parameters, x_TD = parts(policy_out=1.0, policy_input=policy_input, learner="value")
  parameters["value_out"] += 1.0
  embedding_TD = jax.random.normal(jax.random.key(9), x_TD.shape)

  def policy_terms(parameters, x_TD, embedding_TD):
    context = make_context(TOKENS, 6)._replace(embedding_TD=embedding_TD)
    terms = router(parameters, x_TD, context)[1].policy
    return terms.log_prob_T.sum() + terms.expected_count_T.sum() + terms.entropy_T.sum() + terms.value_T.sum()

  def gates(parameters, x_TD, embedding_TD):
    assignment = router(parameters, x_TD, make_context(TOKENS, 6)._replace(embedding_TD=embedding_TD))[0]
    return jnp.sum(assignment.gate_TK**2)

  d_parameters, dx_TD, d_embedding_TD = jax.grad(policy_terms, argnums=(0, 1, 2))(parameters, x_TD, embedding_TD)
  assert not dx_TD.any() and not d_embedding_TD.any() and not d_parameters["router_DE"].any()
  assert d_parameters["policy_in"].any() and d_parameters["value_in"].any()
  d_parameters, dx_TD = jax.grad(gates, argnums=(0, 1))(parameters, x_TD, embedding_TD)
  assert dx_TD.any() and d_parameters["router_DE"].any() and not d_parameters["policy_in"].any()

  # Other hidden states change the counts of the one and not of the other.
  change = policy_terms(parameters, x_TD + 1, embedding_TD) - policy_terms(parameters, x_TD, embedding_TD)
  assert (abs(change) > 1) == (policy_input == "hidden")


def test_padding_takes_no_expert_and_is_not_counted(make_context):
  router, parameters, x_TD = parts()
  mask_T = jnp.arange(TOKENS) < 100
  assignment, stats = router(parameters, x_TD, make_context(TOKENS, 6)._replace(mask_T=mask_T))
  assert not assignment.valid_TK[100:].any() and not assignment.gate_TK[100:].any()
  assert stats.token_count == 100 and stats.count_histogram_K1.sum() == 100 and stats.count_T[100:].sum() == 0
