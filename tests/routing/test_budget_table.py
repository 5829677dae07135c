"""Tables over budgets by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import RoutingConfig
from moe_lab.errors import ConfigError
from moe_lab.routing.budget_table import NUM_KNOTS, at, draw_budgets, knots, mean_asked, shares, table_shape, targets

ONE, RANGE = RoutingConfig(budget=3.0), RoutingConfig(budget_range=(1.0, 8.0))


def test_without_a_range_a_table_is_a_number():
  assert table_shape(ONE) == () and knots(ONE) == 3.0 and targets(ONE) == 3.0
  np.testing.assert_array_equal(shares(jnp.asarray([1.0, 2.0]), ONE), [1, 1])
  assert at(jnp.asarray(0.7), jnp.asarray([1.0, 2.0]), ONE) == pytest.approx(0.7)
  np.testing.assert_array_equal(draw_budgets(jax.random.key(0), 3, ONE), [3, 3, 3])


def test_knots_and_shares_by_hand():
  # Eight knots from 1 to 8, each 8^(1/7) = 1.3459 times the one before.
  step = 8 ** (1 / 7)
  np.testing.assert_allclose(knots(RANGE), step ** np.arange(8), rtol=1e-5)
  budget_T = jnp.asarray([1.0, 8.0, step**2, step**2.25, 0.5, 9.0])
  want = np.zeros((6, NUM_KNOTS))
  want[[0, 1, 2, 4, 5], [0, 7, 2, 0, 7]] = 1
  want[3, 2:4] = 0.75, 0.25
  np.testing.assert_allclose(shares(budget_T, RANGE), want, atol=1e-5)
  # A table that is linear in log budget is read exactly.
  np.testing.assert_allclose(at(jnp.log(knots(RANGE)), budget_T[:4], RANGE), np.log(budget_T[:4]), atol=1e-5)


def test_the_mean_of_what_was_asked_for():
  assert mean_asked(np.asarray(5.0), ONE) == 3.0
  asked = np.zeros(NUM_KNOTS)
  asked[[0, 7]] = 30, 10
  assert mean_asked(asked, RANGE) == pytest.approx(30 / 40 * 1 + 10 / 40 * 8)


def test_at_most_aims_a_little_under_every_knot():
  config = RoutingConfig(budget_range=(1.0, 8.0), budget_mode="at_most")
  np.testing.assert_allclose(targets(config)[[0, 1, 7]], [1.0, 0.98 * 8 ** (1 / 7), 7.84], rtol=1e-5)


def test_budgets_are_uniform():
  budgets = draw_budgets(jax.random.key(0), 4000, RANGE)
  assert budgets.min() >= 1 and budgets.max() <= 8
  np.testing.assert_allclose(np.histogram(budgets, 3, (1, 8))[0] / 4000, 1 / 3, atol=0.03)


@pytest.mark.parametrize(
  "fields, line",
  [
    (dict(method="topk", budget_range=(1.0, 2.0)), "budget_range.*topk has one budget"),
    (dict(budget_range=(1.0,)), "two budgets"),
    (dict(budget_range=(3.0, 2.0)), "more than 3"),
    (dict(budget_range=(0.5, 2.0)), "at least 1"),
    (dict(budget_range=(3.0, 6.0)), "routing.budget.*within"),
  ],
)
def test_ranges_that_do_not_fit_are_refused(fields, line):
  with pytest.raises(ConfigError, match=line):
    RoutingConfig(**fields)


@pytest.mark.parametrize(
  "fields, budgets",
  [
    (dict(), (2, 2)),  # the price of values was found for one
    (dict(learner="leave_one_out"), (1, 8)),  # that policy's prior follows any budget
    (dict(budget_range=(1.5, 4.0)), (1.5, 4)),
    (dict(method="topk", k=3), (3, 3)),
    (dict(method="random_k", k_max=2, count_shares=(0.5, 0.5), budget=1.5), (1.5, 1.5)),
    (dict(method="null_experts"), (2, 2)),  # a threshold was steered to one
    (dict(method="null_experts", budget_range=(1.0, 4.0)), (1, 4)),
    (dict(method="sequence_topk", k_min=0), (1, 8)),
  ],
)
def test_what_a_trained_model_can_be_asked_for(fields, budgets):
  assert RoutingConfig(**fields).budgets == budgets
