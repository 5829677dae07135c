"""Alarms on numbers worked by hand."""

import pytest

from moe_lab.evaluate.alarms import alarms, dead_experts, max_over_mean_load

EVEN = [0.25, 0.25, 0.25, 0.25]
HALF_DEAD = [0.5, 0.4975, 0.0024, 0.0001]  # times 4: 2.0, 1.99, 0.0096, 0.0004
MIXED = [0.0, 0.5, 0.3, 0.2]  # counts 0 to 3; mean 1.7


def result(load=EVEN, histogram=MIXED, mean=1.7):
  return {"load": [EVEN, load], "k_histogram": [MIXED, histogram], "mean_experts": mean}


def test_load():
  assert dead_experts([EVEN, HALF_DEAD]) == [0, 2]
  assert max_over_mean_load([EVEN, HALF_DEAD]) == pytest.approx([1.0, 2.0])


def test_nothing_wrong():
  assert alarms(result(), 1.7, fixed_count=False) == []
  assert alarms(result(mean=1.65), 1.7, fixed_count=False) == []  # 2.9% below
  one_layer_alike = result(histogram=[0, 0, 1.0, 0])
  assert alarms(one_layer_alike, 1.7, fixed_count=False) == []


def test_each_alarm():
  assert alarms(result(load=HALF_DEAD), 1.7, fixed_count=False) == ["layer 1: 2 of 4 experts are dead"]
  assert alarms(result(), 2.0, fixed_count=False) == ["1.70 experts for a budget of 2.00"]
  alike = {"load": [EVEN], "k_histogram": [[0, 0.005, 0.995, 0]], "mean_experts": 1.995}
  assert alarms(alike, 2.0, fixed_count=False) == ["nearly every token takes the same count (2)"]
  assert alarms(alike, 2.0, fixed_count=True) == []
