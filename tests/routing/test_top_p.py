"""Top-p by hand, and the controller of its threshold."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.base import Observed
from moe_lab.routing.steering import initial_level, steered
from moe_lab.routing.top_p import TopP, TopPSteered, count_to_reach

LOGITS = jnp.log(jnp.asarray([[1.0, 2, 5, 2], [1, 1, 1, 1], [97, 1, 1, 1]]))  # tenths; quarters; hundredths


def test_the_smallest_set_that_reaches_p():
  # 0.5 + 0.2 = 0.7; 3 of 4 quarters are 0.75; 0.97.
  prob_TK = jnp.asarray([[0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
  np.testing.assert_array_equal(count_to_reach(prob_TK, 0.6), [2, 3, 1])
  np.testing.assert_array_equal(count_to_reach(prob_TK, jnp.asarray([0.45, 0.2, 0.98])), [1, 1, 2])


def test_top_p_by_hand(make_context):
  router = TopP(RoutingConfig(method="top_p", k_max=4, top_p=0.6))
  assignment, stats = router({"router_DE": jnp.eye(4)}, LOGITS, make_context(3, 4, dim=4))
  np.testing.assert_array_equal(stats.count_T, [2, 3, 1])
  assert assignment.expert_TK[0, 0] == 2 and assignment.expert_TK[2, 0] == 0
  # Gates are probabilities over all experts.
  want = np.array([[0.5, 0.2, 0, 0], [0.25, 0.25, 0.25, 0], [0.97, 0, 0, 0]])
  np.testing.assert_allclose(assignment.gate_TK, want, rtol=1e-5)
  # The entropy loss is the mean entropy: (1.2206 + ln 4 + 0.1677) / 3.
  p = np.exp(np.asarray(LOGITS)) / np.exp(np.asarray(LOGITS)).sum(1, keepdims=True)
  (loss, weight) = router.losses(stats, None)["router_entropy"]
  assert loss == pytest.approx(-(p * np.log(p)).sum() / 3, rel=1e-5) and weight == 1e-4


def test_k_max_caps_the_set_and_k_min_fills_it(make_context):
  router = TopP(RoutingConfig(method="top_p", k_min=2, k_max=2, top_p=0.6))
  _, stats = router({"router_DE": jnp.eye(4)}, LOGITS, make_context(3, 4, dim=4))
  np.testing.assert_array_equal(stats.count_T, [2, 2, 2])


def test_the_steered_threshold_is_of_standardised_logits(make_context):
  router = TopPSteered(RoutingConfig(method="top_p_pi", k_max=2))
  context = make_context(2, 2, dim=2)
  # Two logits standardise to +-1: probabilities 0.881 and 0.119 however far apart they were.
  parameters, x_TD = {"router_DE": jnp.eye(2), "log_scale": jnp.zeros(1)}, jnp.asarray([[0.0, 8.0], [0.3, 0.0]])
  for level, counts in ((1.9, [1, 1]), (2.1, [2, 2])):  # sigmoid: 0.870, 0.891
    context = context._replace(state=context.state._replace(method={"level": jnp.asarray(level)}))
    assignment, stats = router(parameters, x_TD, context)
    np.testing.assert_array_equal(stats.count_T, counts)
    # The gates of those taken sum to one.
    gates = {1: [1.0, 0.0], 2: [0.8808, 0.1192]}[counts[0]]
    np.testing.assert_allclose(assignment.gate_TK, [gates] * 2, atol=1e-3)


def seen(*means):
  return Observed(jnp.ones(()), jnp.asarray(means), None, None, None, {}, None)


def test_the_controller_by_hand():
  config = RoutingConfig(method="top_p_pi", budget=2.0)
  # Layers at 1 and 2 of 2 experts: errors 0.5 and 0; the integral moves by 0.05 of that, the level 0.2 more.
  state = steered(initial_level(config, 2, 1.0), seen(1.0, 2.0), config)
  np.testing.assert_allclose(state["level_integral"], [1.025, 1.0], rtol=1e-6)
  np.testing.assert_allclose(state["level"], [1.125, 1.0], rtol=1e-6)
  # One level for all layers goes by their mean, 1.5: error 0.25.
  state = steered(initial_level(config, 2, 1.0), seen(1.0, 2.0), config, per_layer=False)
  np.testing.assert_allclose(state["level"], 1 + 0.25 * 0.25, rtol=1e-6)
