"""The count policy's arithmetic: prior, greedy rule, calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.count_policy import budget_log_prior, calibrated_shift, entropy, expected_count, greedy_count

RANGES = [(1, 8), (1, 2), (2, 5), (1, 16), (1, 64), (3, 3)]


@pytest.mark.parametrize("k_min, k_max", RANGES)
def test_the_priors_mean_is_the_budget(k_min, k_max):
  budget_T = jnp.linspace(k_min, k_max, 203)  # both ends included
  log_prior_TA = budget_log_prior(budget_T, k_min, k_max)
  assert log_prior_TA.shape == (203, k_max - k_min + 1)
  np.testing.assert_allclose(jnp.exp(log_prior_TA).sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(expected_count(log_prior_TA, k_min), budget_T, atol=1e-3)


def test_a_range_of_hundreds_stays_finite():
  log_prior_TA = budget_log_prior(jnp.asarray([1.0, 2, 100, 256]), 1, 256)
  assert np.isfinite(log_prior_TA).all()
  np.testing.assert_allclose(expected_count(log_prior_TA, 1), [1, 2, 100, 256], rtol=1e-3)


def test_prior_by_hand():
  # Counts 1, 2 with mean 1.25: probabilities 3/4 and 1/4. Half way between the ends: uniform.
  np.testing.assert_allclose(jnp.exp(budget_log_prior(jnp.asarray([1.25]), 1, 2))[0], [0.75, 0.25], atol=1e-4)
  np.testing.assert_allclose(jnp.exp(budget_log_prior(jnp.asarray([4.5]), 1, 8))[0], np.full(8, 1 / 8), atol=1e-5)
  # Mean 2 of 1, 2, 3, 4 (p ~ r^k): (1 + 2r + 3r^2 + 4r^3) = 2 (1 + r + r^2 + r^3), that is 2r^3 + r^2 = 1, r = 0.65730.
  prior = jnp.exp(budget_log_prior(jnp.asarray([2.0]), 1, 4))[0]
  np.testing.assert_allclose(prior[1:] / prior[:-1], 0.65730, atol=1e-4)


def test_no_distribution_of_that_mean_has_more_entropy():
  prior = np.exp(np.asarray(budget_log_prior(jnp.asarray([2.0]), 1, 8))[0], dtype=np.float64)
  counts, rng = np.arange(1, 9), np.random.default_rng(0)
  basis = np.linalg.svd(np.stack([np.ones(8), counts]))[2][2:]  # directions that keep sum and mean
  for direction in rng.normal(size=(20, 6)) @ basis:
    other = prior + 1e-3 * direction
    assert (other > 0).all() and other @ counts == pytest.approx(prior @ counts)
    assert -(other * np.log(other)).sum() < -(prior * np.log(prior)).sum()


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 4.5, 7.9])
def test_sampled_mean_of_the_untrained_policy(budget):
  log_prior_TA = budget_log_prior(jnp.asarray([budget]), 1, 8)
  samples = 1 + jax.random.categorical(jax.random.key(0), log_prior_TA[0], shape=(40_000,))
  # The standard error is at most 2.3 / 200.
  np.testing.assert_allclose(samples.mean(), budget, atol=0.04)


def test_entropy_and_mean_by_hand():
  log_prob_TA = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
  np.testing.assert_allclose(entropy(log_prob_TA), [1.5 * np.log(2), np.log(3)], rtol=1e-6)
  np.testing.assert_allclose(expected_count(log_prob_TA, 2), [2.75, 3.0], rtol=1e-6)  # 1 + 3/4 + 1 = 2.75


def test_greedy_count_rounds_shifts_and_stays_in_range():
  expected_T = jnp.asarray([1.2, 1.6, 3.4, 7.9])
  np.testing.assert_array_equal(greedy_count(expected_T, 0.0, 1, 8), [1, 2, 3, 8])
  np.testing.assert_array_equal(greedy_count(expected_T, 0.4, 1, 8), [2, 2, 4, 8])  # 1.6, 2.0, 3.8, 8.3
  np.testing.assert_array_equal(greedy_count(expected_T, -1.0, 1, 8), [1, 1, 2, 7])  # 0.2, 0.6, 2.4, 6.9
  assert greedy_count(expected_T, 0.0, 1, 8).dtype == jnp.int32


def test_calibrated_shift_by_hand():
  shift_Z, sampled_Z, greedy_Z = jnp.asarray([0.1, 0.0]), jnp.asarray([2.0, 3.0]), jnp.asarray([1.0, 4.0])
  exactly = calibrated_shift(shift_Z, sampled_Z, greedy_Z, RoutingConfig(budget=2.0))
  np.testing.assert_allclose(exactly, [0.15, -0.05], rtol=1e-6)  # + 0.05 * (sampled - greedy)
  at_most = calibrated_shift(shift_Z, sampled_Z, greedy_Z, RoutingConfig(budget=2.0, budget_mode="at_most"))
  np.testing.assert_allclose(at_most, [0.0, -0.027], atol=1e-7)  # 0.05 * (0.98 * 2 - 2.5) = -0.027; 0.1 is cut to 0


@pytest.mark.parametrize("mode, budget", [("exactly", 2.0), ("at_most", 2.0), ("at_most", 1.5)])
def test_calibration_holds_the_mean_of_a_fixed_policy(mode, budget):
  # Three layers of skewed policies whose samples average 2 while their rounded means do not.
  rng = np.random.default_rng(0)
  expected_ZT = jnp.asarray(1 + rng.gamma(0.6, 1 / 0.6, (3, 4000)), jnp.float32)
  expected_ZT = 1 + (expected_ZT - 1) / (expected_ZT - 1).mean(1, keepdims=True)
  config = RoutingConfig(budget=budget, budget_mode=mode)

  def greedy_mean(shift_Z):
    return greedy_count(expected_ZT, shift_Z[:, None], 1, 8).mean(1)

  def step(shift_Z, _):
    return calibrated_shift(shift_Z, expected_ZT.mean(1), greedy_mean(shift_Z), config), None

  shift_Z, _ = jax.lax.scan(step, jnp.zeros(3), length=400)
  start, end = greedy_mean(jnp.zeros(3)), greedy_mean(shift_Z)
  assert np.abs(start - 2).min() > 0.02
  if mode == "exactly":
    np.testing.assert_allclose(end, [2.0] * 3, atol=0.01)
  else:  # one shift for all layers, which may only take away
    assert (shift_Z <= 0).all()
    assert end.mean() == pytest.approx(min(0.98 * budget, float(start.mean())), abs=0.01)
