"""The power law and the ratios on numbers made by hand."""

import numpy as np
import pytest

from moe_lab.evaluate.scaling import equal_loss_ratio, fit_power_law, saved_to_loss


def law(flops, parameters, a=2.0, alpha=0.06, beta=0.03):
  return np.exp(a) * flops**-alpha * parameters**-beta


GRID = [(f, p) for f in (1e6, 2e6, 4e6, 8e6) for p in (1e6, 4e6, 16e6)]


def test_an_exact_law_is_found_with_narrow_intervals():
  found = fit_power_law([(f, p, law(f, p)) for f, p in GRID])
  assert found.models == 12 and found.residual < 1e-10
  for interval, value in ((found.a, 2.0), (found.alpha, 0.06), (found.beta, 0.03)):
    assert interval.value == pytest.approx(value, abs=1e-8)
    assert interval.low == pytest.approx(value, abs=1e-6) and interval.high == pytest.approx(value, abs=1e-6)


def test_noise_widens_the_intervals_around_the_truth():
  inside = 0
  for seed in range(20):
    rng = np.random.default_rng(seed)
    found = fit_power_law([(f, p, law(f, p) * np.exp(0.01 * rng.normal())) for f, p in GRID * 3])
    inside += found.alpha.low < 0.06 < found.alpha.high
    # 0.01 / (sqrt(36) * 0.775, the deviation of ln F) = 0.0022; 90% are 3.3 of it.
    assert found.alpha.high - found.alpha.low == pytest.approx(0.0071, rel=0.5)
    assert found.residual == pytest.approx(0.01, rel=0.4)
  assert inside >= 14  # of 20 at 90%: fewer than 14 come once in 400


def test_models_that_do_not_tell_size_from_compute():
  dense = fit_power_law([(f, 3 * f, law(f, 3 * f)) for f in (1e6, 2e6, 4e6, 8e6)])
  assert dense.beta is None and dense.alpha.value == pytest.approx(0.09)
  assert fit_power_law([(1e6, 1e6, 3.0), (1e6, 2e6, 2.9), (2e6, 2e6, 2.8)]) is None


def test_ratio_at_equal_loss():
  dense = [(1e6, 4.0), (4e6, 3.5), (16e6, 3.0)]
  # Loss 3.25 is half way from 4e6 to 16e6: 8e6; the model takes 2e6.
  assert equal_loss_ratio(dense, 2e6, 3.25) == pytest.approx(4.0)
  assert equal_loss_ratio(dense, 2e6, 2.9) is None and equal_loss_ratio(dense, 2e6, 4.1) is None
  assert equal_loss_ratio(dense, 2e6, 4.0) == pytest.approx(0.5)


def test_saved_to_loss():
  curve = [(100.0, 5.0), (200.0, 4.0), (400.0, 3.5)]
  assert saved_to_loss(curve, 400.0, 4.0) == pytest.approx(2.0)
  assert saved_to_loss(curve, 400.0, 3.0) is None
