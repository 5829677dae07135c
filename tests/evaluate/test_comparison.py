"""Interpolation, paired differences and savings on numbers worked by hand."""

import math

import pytest

from moe_lab.evaluate.savings import savings
from moe_lab.evaluate.significance import paired_difference
from moe_lab.evaluate.tradeoff import compute_at, loss_at, matched

CURVE = [(400.0, 3.2), (100.0, 4.0), (200.0, 3.5)]  # in any order


def test_loss_between_models_is_linear_in_log_compute():
  assert loss_at(CURVE, 200) == pytest.approx(3.5)
  assert loss_at(CURVE, 100 * math.sqrt(2)) == pytest.approx(3.75)  # half way between 100 and 200
  assert loss_at(CURVE, 200 * 2**0.25) == pytest.approx(3.5 - 0.25 * 0.3)
  assert loss_at(CURVE, 100) == pytest.approx(4.0) and loss_at(CURVE, 400) == pytest.approx(3.2)


def test_nothing_is_said_outside_the_curve():
  assert loss_at(CURVE, 99) is None and loss_at(CURVE, 401) is None
  assert loss_at(CURVE[:1], 400) is None and loss_at([], 1) is None
  assert compute_at(CURVE, 3.1) is None and compute_at([], 1.0) is None


def test_compute_to_reach_a_loss_inverts_it():
  assert compute_at(CURVE, 3.75) == pytest.approx(100 * math.sqrt(2))
  assert compute_at(CURVE, 3.2) == pytest.approx(400)
  assert loss_at(CURVE, compute_at(CURVE, 3.3)) == pytest.approx(3.3)
  assert compute_at(CURVE, 4.5) == 100  # there from the first model on: an upper bound
  # A curve that rises again is reached where it first comes down.
  assert compute_at([(1, 4.0), (2, 3.0), (4, 3.5), (8, 2.0)], 3.5) == pytest.approx(math.sqrt(2))


def test_matched_within_two_percent():
  assert matched(102, 100) and matched(98, 100)
  assert not matched(102.1, 100) and not matched(97.9, 100)


def test_a_win_needs_every_seed_and_two_standard_errors():
  control = {"0": 3.0, "1": 3.1, "2": 3.2}
  # Differences -0.02, -0.03, -0.04: mean -0.03, deviation 0.01, error 0.01 / sqrt(3) = 0.00577.
  won = paired_difference({"0": 2.98, "1": 3.07, "2": 3.16}, control)
  assert won.mean == pytest.approx(-0.03) and won.standard_error == pytest.approx(0.01 / math.sqrt(3))
  assert won.win and won.by_seed["2"] == pytest.approx(-0.04)
  # -0.01, -0.01, -0.10: all below zero, mean -0.04, deviation 0.05196, error 0.03: 1.33 errors.
  spread = paired_difference({"0": 2.99, "1": 3.09, "2": 3.10}, control)
  assert spread.standard_error == pytest.approx(0.03) and not spread.win
  # One seed on the other side, however little.
  assert not paired_difference({"0": 2.9, "1": 3.0, "2": 3.2001}, control).win
  # Worse everywhere is no win, however sure.
  assert not paired_difference({"0": 3.02, "1": 3.13, "2": 3.24}, control).win


def test_only_seeds_in_common_count_and_one_is_not_enough():
  one = paired_difference({"0": 2.0, "7": 1.0}, {"0": 3.0, "1": 3.0})
  assert one.by_seed == {"0": -1.0} and one.mean == -1.0 and one.standard_error is None and not one.win
  assert paired_difference({"7": 1.0}, {"0": 3.0}) == ({}, None, None, False)


def test_savings():
  fixed = {"0": {2: 4.0, 4: 3.8}, "1": {2: 4.2, 4: 4.0, 1: 4.4}, "2": {4: 3.9}}
  method = {
    "0": [(1.0, 4.1), (2.0, 3.8), (4.0, 3.7)],  # reaches 3.8 at 2
    "1": [(1.0, 4.3), (2.0, 4.1), (4.0, 3.9)],  # reaches 4.0 half way from 2 to 4: 2.828
    "2": [(1.0, 4.0)],  # its fixed k = 2 is missing
  }
  found = savings(fixed, method, 8)
  assert found.reference == 4 and found.needed == {"0": pytest.approx(2.0), "1": pytest.approx(2 * math.sqrt(2))}
  assert found.gain == pytest.approx((0.2 / 4.0 + 0.2 / 4.2) / 2) and not found.saturated
  assert found.mean_needed == pytest.approx(1 + math.sqrt(2))
  assert found.saved == pytest.approx(1 - (1 + math.sqrt(2)) / 4)


def test_savings_that_prove_nothing_are_said_to():
  flat = savings({"0": {2: 4.0, 4: 3.97}}, {"0": [(1.0, 3.9)]}, 8)  # 0.75% better
  assert flat.saturated and flat.mean_needed == 1.0
  never = savings({"0": {2: 4.0, 4: 3.8}}, {"0": [(1.0, 4.1), (4.0, 3.9)]}, 8)
  assert never.needed == {"0": None} and never.mean_needed is None and never.saved is None
  assert savings({}, {"0": [(1.0, 4.1)]}, 8) is None
