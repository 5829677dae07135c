"""Methods that take every expert above a threshold: learned, running quantile, ReLU, entropy; by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.routing.base import Observed, RouterStats
from moe_lab.routing.entropy_rule import EntropyRule, entropy_count
from moe_lab.routing.expert_threshold import ExpertThreshold, upper_quantile
from moe_lab.routing.learned_threshold import LearnedThreshold
from moe_lab.routing.relu import ReLU


def route(router, make_context, parameters, x_TD, mask_T=None, key=None):
  context = make_context(x_TD.shape[0], parameters["router_DE"].shape[1], dim=x_TD.shape[1])
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, parameters["router_DE"].shape[1]))
  context = context._replace(state=state, key=key, mask_T=context.mask_T if mask_T is None else jnp.asarray(mask_T))
  return router(parameters, x_TD, context)


def seen(mean, sums=None, tokens=1.0):
  return Observed(jnp.ones(()), jnp.asarray(mean), None, None, jnp.asarray(tokens), sums or {}, None)


def test_relu_by_hand(make_context):
  router = ReLU(RoutingConfig(method="relu", k_max=2))
  x_TD = jnp.asarray([[0.5, -1.0, 2.0, 0.25], [-1.0, -2.0, -3.0, 0.75], [-1.0, -1, -1, -1], [1.0, 1, 1, 1]])
  assignment, stats = route(router, make_context, {"router_DE": jnp.eye(4)}, x_TD, [True, True, True, False])
  np.testing.assert_array_equal(stats.count_T, [2, 1, 0, 0])  # of three gates the two largest
  np.testing.assert_allclose(assignment.gate_TK, [[2.0, 0.5], [0.75, 0], [0, 0], [0, 0]])
  np.testing.assert_allclose(stats.sums["gate_E"], [0.5, 0, 2.0, 1.0])
  # Open for 1, 0, 1 and 2 of 3 tokens, where 2 of 4 is the fair share: 2/3, 0, 2/3, 4/3 of it, whatever k_max cuts
  # off. Sum of that times the mean gate: (2/3 * 0.5 + 2/3 * 2 + 4/3 * 1) / 3.
  stacked = jax.tree.map(lambda leaf: leaf[None], stats)
  loss, weight = router.losses(stacked, router.initial_state(1, 4))["gate_l1"]
  assert loss == pytest.approx(1.0) and weight == pytest.approx(1e-8)


def test_relus_coefficient_follows_the_error():
  router = ReLU(RoutingConfig(method="relu", budget=2.0))
  state = router.initial_state(2, 4)

  def coefficient(*open_gates):  # of a token in each layer; what k_max left of them does not matter
    sums = {"open_E": 10 * jnp.asarray(open_gates)[:, None] * jnp.full(4, 0.25)}
    return router.updated_method_state(state, seen([2.0, 2.0], sums, 10.0))["l1"][0]

  assert coefficient(3.0, 2.0) == pytest.approx(1.2e-8)
  assert coefficient(1.0, 2.0) == pytest.approx(1e-8 / 1.2)
  # Five per cent over is half of what counts in full.
  assert coefficient(2.2, 2.0) == pytest.approx(1e-8 * 1.2**0.5)


def test_learned_thresholds_by_hand(make_context):
  # D = 4: a cosine of 1/2 is one of its deviations by chance. Token 0 has cosines 0.5, 0.5, 0.5, 0.5 with the four
  # axes, token 1 1, 0, 0, 0: logits 1 1 1 1 and 2 0 0 0. The level at the start is the normal quantile of 2 / 4: 0.
  router = LearnedThreshold(RoutingConfig(method="learned_threshold", k_max=4, budget=2.0))
  assert router.parameters(ModelConfig(dim=4, num_experts=4)).keys() == {"router_DE", "threshold_E"}
  parameters = {"router_DE": 3 * jnp.eye(4), "threshold_E": jnp.asarray([0.5, 1.5, 0.9, 1.1])}
  x_TD = jnp.asarray([[1.0, 1, 1, 1], [7.0, 0, 0, 0], [0, 0, 0, -1.0]])
  assignment, stats = route(router, make_context, parameters, x_TD)
  np.testing.assert_array_equal(stats.count_T, [2, 1, 1])  # the last passes none and takes its best
  np.testing.assert_array_equal(assignment.expert_TK[:2, 0], [0, 0])  # furthest over its threshold
  np.testing.assert_allclose(assignment.gate_TK, [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], rtol=1e-6)
  assert stats.sums["diversity"] == pytest.approx(0, abs=1e-5)  # orthogonal already
  assert stats.sums["simplicity"] == pytest.approx(3 * 3.0)  # three tokens, lengths of 3
  # In training a token that passes nothing takes nothing.
  _, stats = route(router, make_context, parameters, x_TD, key=jax.random.key(0))
  np.testing.assert_array_equal(stats.count_T, [2, 1, 0])

  def gates(threshold_E):
    return route(router, make_context, parameters | {"threshold_E": threshold_E}, x_TD[:2])[0].gate_TK.sum()

  # d gate / d threshold = -s (1 - s) / count, s the sigmoid of what is over: 0.5 and 1.5 for expert 0, 0.1 for 2.
  s = 1 / (1 + np.exp(-np.array([0.5, 1.5, 0.1])))
  slope = -s * (1 - s)
  want = [slope[0] / 2 + slope[1], 0, slope[2] / 2, 0]
  np.testing.assert_allclose(jax.grad(gates)(parameters["threshold_E"]), want, rtol=1e-5)


def test_upper_quantile_by_hand():
  # Of four real values 4 3 2 1 a quarter is above 3, a half above 2; padding (9) does not count.
  values_TE, mask_T = jnp.asarray([[1.0], [4], [9], [3], [2]]), jnp.asarray([True, True, False, True, True])
  for share, want in ((0.25, 3), (0.5, 2), (0.0, 4), (1.0, 1)):
    assert upper_quantile(values_TE, mask_T, jnp.asarray(share))[0] == want


def test_expert_threshold_by_hand(make_context):
  router = ExpertThreshold(RoutingConfig(method="expert_threshold", k_max=3, budget=1.0))
  state = router.initial_state(1, 4)
  np.testing.assert_allclose(state.method["threshold_E"], 0.6745, atol=1e-4)  # a quarter of a normal lies above
  x_TD = jnp.asarray([[1.0, 0, 2.0, 0.6], [0.5, 0.6, 0, 0], [1.0, 1, 1, 1], [0, 0, 0, 0]])
  assignment, stats = route(router, make_context, {"router_DE": jnp.eye(4)}, x_TD)
  np.testing.assert_array_equal(stats.count_T, [2, 1, 3, 1])  # at least one, at most three
  np.testing.assert_allclose(assignment.gate_TK[0, :2], 1 / (1 + np.exp([-2.0, -1.0])), rtol=1e-5)
  # A quarter of four tokens: one is above each quantile, so it is the second largest of the four.
  np.testing.assert_allclose(stats.sums["quantile_E"], 4 * np.array([1.0, 0.6, 1.0, 0.6]), rtol=1e-6)
  sums = {"quantile_E": stats.sums["quantile_E"][None]}
  new = router.updated_method_state(state, seen([1.5], sums, tokens=4.0))
  np.testing.assert_allclose(new["threshold_E"][0, 0], 0.95 * 0.6745 + 0.05 * 1.0, atol=1e-4)
  assert new["level"][0] == pytest.approx(-0.25 * 0.5)  # half too many: a smaller share from now on


def test_entropy_counts_by_hand(make_context):
  # Mean 1, deviation 0.1: at the mean exp(ln 2) = 2; a deviation up 2 * e^0.6 = 3.64; two down 2 * e^-1.2 = 0.60.
  counts = entropy_count(jnp.asarray([1.0, 1.1, 0.8]), jnp.asarray(1.0), jnp.asarray(1.01), jnp.log(2.0))
  np.testing.assert_array_equal(counts, [2, 4, 1])
  router = EntropyRule(RoutingConfig(method="entropy_rule", k_max=4, standardise=False))
  x_TD = jnp.asarray([[0.0, 0, 0, 0], [9.0, 0, 0, 0]])
  _, stats = route(router, make_context, {"router_DE": jnp.eye(4)}, x_TD)
  assert stats.count_T[0] > stats.count_T[1]  # undecided, decided
  assert stats.sums["entropy"] == pytest.approx(np.log(4), abs=0.01)
  sums = {"entropy": jnp.asarray([3.0]), "entropy_square": jnp.asarray([5.0])}
  new = router.updated_method_state(router.initial_state(1, 4), seen([2.0], sums, tokens=2.0))
  start = np.log(4) - 0.5
  np.testing.assert_allclose(new["entropy"], 0.95 * start + 0.05 * 1.5, rtol=1e-5)
  np.testing.assert_allclose(new["entropy_square"], 0.95 * (start**2 + 0.02) + 0.05 * 2.5, rtol=1e-5)


def test_a_missing_statistic_is_an_error():
  router = ReLU(RoutingConfig(method="relu"))
  stats = RouterStats(*[jnp.ones(1)] * 8, None, {}, None)
  with pytest.raises(KeyError, match="gate_E"):
    router.losses(stats, router.initial_state(1, 4))
