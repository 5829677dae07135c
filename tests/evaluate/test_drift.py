"""How far apart two models route: worked numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.evaluate.drift import divergence, overlap, taken
from moe_lab.routing.base import Choice


def choice(logits, experts, counts):
  experts = jnp.asarray(experts)
  valid = jnp.arange(experts.shape[-1]) < jnp.asarray(counts)[:, None]
  return Choice(jnp.asarray(logits, jnp.float32), experts, valid)


def test_sets_leave_out_slots_that_are_not_in_use():
  sets = taken(choice(np.zeros((3, 4)), [[2, 0], [1, 3], [3, 3]], [2, 1, 0]))
  np.testing.assert_array_equal(sets, [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


def test_overlap():
  # {0, 2} and {2}: 1 of 2. {1} and {3}: 0 of 2. Nothing and nothing: the same.
  a = taken(choice(np.zeros((3, 4)), [[2, 0], [1, 0], [0, 0]], [2, 1, 0]))
  b = taken(choice(np.zeros((3, 4)), [[2, 0], [3, 0], [0, 0]], [1, 1, 0]))
  np.testing.assert_allclose(overlap(a, b), [0.5, 0.0, 1.0])


def test_divergence():
  # p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2 = 0.1438.
  p = choice([[0.0, 0.0]], [[0]], [1])
  q = choice([[0.0, np.log(3.0)]], [[1]], [1])
  assert float(divergence(p, q)[0]) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)
  assert float(divergence(q, q)[0]) == pytest.approx(0, abs=1e-7)
