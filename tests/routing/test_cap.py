"""Caps on the experts of a token and of a batch, by hand."""

import jax.numpy as jnp
import numpy as np

from moe_lab.routing.base import Assignment, Caps
from moe_lab.routing.cap import capped, shared


def test_the_hardest_are_served_first():
  # Eight rows: four go to the floors, three to the token that wants 4, the last to the more urgent of the two that
  # want 3.
  count_T = shared(jnp.array([3, 4, 1, 3]), jnp.array([0.1, 0.0, 0.9, 0.2]), 1, jnp.int32(8))
  np.testing.assert_array_equal(count_T, [1, 4, 1, 2])


def test_floors_hold_whatever_the_rows():
  np.testing.assert_array_equal(shared(jnp.array([3, 0, 5]), jnp.zeros(3), 2, jnp.int32(1)), [2, 0, 2])


def test_enough_rows_cut_nothing():
  np.testing.assert_array_equal(shared(jnp.array([3, 0, 5]), jnp.zeros(3), 1, jnp.int32(8)), [3, 0, 5])


def test_a_cap_keeps_the_best_experts_and_their_gates():
  gate_TK = jnp.array([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.0, 0.0, 0.0]])
  assignment = Assignment(jnp.array([[4, 1, 2], [0, 3, 1], [0, 1, 2]]), gate_TK, gate_TK > 0)
  cut = capped(assignment, Caps(jnp.array([2, 3, 3])), 1)
  np.testing.assert_array_equal(cut.valid_TK.sum(-1), [2, 2, 0])
  np.testing.assert_allclose(cut.gate_TK, [[0.5, 0.3, 0], [0.6, 0.4, 0], [0, 0, 0]])
  # Three rows for two tokens that want two each: the second's further expert has the larger gate.
  cut = capped(assignment, Caps(jnp.array([2, 3, 3]), jnp.int32(3)), 1)
  np.testing.assert_array_equal(cut.valid_TK.sum(-1), [1, 2, 0])
