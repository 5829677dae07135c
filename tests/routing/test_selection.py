"""Which experts, with which gates; and the fixed top-k router on top."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.routing.base import Decisions
from moe_lab.routing.dropout import dropped_experts
from moe_lab.routing.selection import assign, rank_experts, router_logits
from moe_lab.routing.topk import TopK

LOGITS = jnp.log(jnp.asarray([[1.0, 2, 4, 8], [8, 4, 2, 1], [1, 8, 2, 4]]))  # [T = 3, E = 4]


def test_gates_by_hand():
  # K = 3: weights 8, 4, 2 of 14 whatever the count; the experts of rows 0..2 are 3 2 1, 0 1 2, 1 3 2.
  expert_TK = jnp.asarray([[3, 2, 1], [0, 1, 2], [1, 3, 2]])
  assignment = assign(LOGITS, expert_TK, jnp.asarray([2, 3, 1]), jnp.asarray([True, True, False]))
  want = np.array([[8, 4, 0], [8, 4, 2], [0, 0, 0]]) / 14
  np.testing.assert_allclose(assignment.gate_TK, want, rtol=1e-6)
  np.testing.assert_array_equal(assignment.valid_TK, want > 0)


def test_assignments_keep_their_promises(make_context):
  rng = np.random.default_rng(0)
  tokens, experts, slots = 101, 9, 4
  logits_TE = jnp.asarray(rng.normal(size=(tokens, experts)), jnp.float32)
  count_T, mask_T = jnp.asarray(rng.integers(0, slots + 1, tokens)), jnp.asarray(rng.random(tokens) < 0.8)
  expert_TK = rank_experts(logits_TE, slots, 0.0, make_context(tokens, experts))
  expert_TK, gate_TK, valid_TK = (np.asarray(a) for a in assign(logits_TE, expert_TK, count_T, mask_T)[:3])
  np.testing.assert_array_equal(valid_TK.sum(1), np.where(mask_T, count_T, 0))
  assert (np.diff(valid_TK.astype(int), axis=1) <= 0).all()  # valid slots first
  assert all(len(set(row)) == slots for row in expert_TK)
  assert (np.diff(np.take_along_axis(np.asarray(logits_TE), expert_TK, 1), axis=1) <= 0).all()  # best first
  assert ((gate_TK > 0) == valid_TK).all()
  full = np.asarray(mask_T) & (np.asarray(count_T) == slots)
  np.testing.assert_allclose(gate_TK[full].sum(1), 1, rtol=1e-6)
  # A smaller count takes parts away and leaves the others alone.
  fewer = assign(logits_TE, jnp.asarray(expert_TK), jnp.maximum(count_T - 1, 0), mask_T)
  np.testing.assert_array_equal(fewer.gate_TK, np.where(fewer.valid_TK, gate_TK, 0))


def test_the_gates_gradient_reaches_the_logits_of_all_slots_and_no_others():
  expert_TK = jnp.asarray([[3, 2, 1]] * 3)
  gradient = jax.grad(lambda logits: assign(logits, expert_TK, jnp.full(3, 1), jnp.ones(3, bool)).gate_TK.sum())(LOGITS)
  # One valid slot of gate p: dp/dl = p (1 - p) for its own logit and -p q for another slot's. Row 0: p = 8/14.
  np.testing.assert_allclose(gradient[0], np.array([0, -8 * 2, -8 * 4, 8 * 6]) / 14**2, rtol=1e-5)


def test_the_bias_decides_the_choice_but_not_the_gate(make_context):
  context = make_context(3, 4)
  context = context._replace(state=context.state._replace(bias_E=jnp.asarray([100.0, 0, 0, 0])))
  expert_TK = rank_experts(LOGITS, 2, 0.0, context)
  np.testing.assert_array_equal(expert_TK, [[0, 3], [0, 1], [0, 1]])
  gate_TK = assign(LOGITS, expert_TK, jnp.full(3, 2), context.mask_T).gate_TK
  np.testing.assert_allclose(gate_TK, np.array([[1 / 9, 8 / 9], [8 / 12, 4 / 12], [1 / 9, 8 / 9]]), rtol=1e-6)


def test_replayed_experts_are_taken_as_they_are(make_context):
  replayed = jnp.asarray([[1, 0], [2, 3], [0, 3]])
  context = make_context(3, 4, key=jax.random.key(0), decisions=Decisions(expert_TK=replayed))
  np.testing.assert_array_equal(rank_experts(LOGITS, 2, 0.3, context), replayed)


def test_logits_are_float32_whatever_comes_in():
  x_TD, router_DE = jax.random.normal(jax.random.key(0), (5, 8)).astype(jnp.bfloat16), jnp.eye(8)[:, :3] * 1.001
  logits_TE = router_logits(x_TD, router_DE)
  assert logits_TE.dtype == jnp.float32
  np.testing.assert_allclose(logits_TE, x_TD.astype(jnp.float32)[:, :3] * 1.001, rtol=1e-6)


def test_dropped_experts_leave_the_choice_in_training_only(make_context):
  logits_TE = jax.random.normal(jax.random.key(1), (50, 8))
  state = make_context(50, 8).state
  plain_TK = rank_experts(logits_TE, 3, 0.4, make_context(50, 8))  # no key: inference
  np.testing.assert_array_equal(plain_TK, jax.lax.top_k(logits_TE, 3)[1])
  num_dropped = 0
  for seed in range(10):
    key = jax.random.key(seed)
    dropped_E = np.asarray(dropped_experts(jax.random.fold_in(key, 1), state.load_E, 0.4, 3))
    expert_TK = rank_experts(logits_TE, 3, 0.4, make_context(50, 8, key=key))
    assert not dropped_E[expert_TK].any()
    num_dropped += dropped_E.sum()
    # The others keep their order.
    want_TK = jax.lax.top_k(jnp.where(dropped_E, -jnp.inf, logits_TE), 3)[1]
    np.testing.assert_array_equal(expert_TK, want_TK)
  assert num_dropped > 10


def test_topk_by_hand(make_context):
  # The router reads the logits off the hidden state; token 2 is padding.
  router = TopK(RoutingConfig(method="topk", k=2, standardise=False))
  assert router.parameters(ModelConfig(dim=16, num_experts=5)) == {"router_DE": ((16, 5), 0.25)}
  context = make_context(3, 4, dim=4, mask_T=jnp.asarray([True, True, False]))
  assignment, stats = router({"router_DE": jnp.eye(4)}, LOGITS, context)
  np.testing.assert_array_equal(assignment.expert_TK[:2], [[3, 2], [0, 1]])
  np.testing.assert_allclose(assignment.gate_TK, [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0, 0]], rtol=1e-6)
  assert stats.token_count == 2 and stats.dropped_sum == 0 and stats.policy is None
  np.testing.assert_array_equal(stats.assigned_E, [1, 1, 1, 1])
  np.testing.assert_array_equal(stats.count_T, [2, 2, 0])
  np.testing.assert_array_equal(stats.count_histogram_K1, [0, 0, 2])
  # Probabilities 1, 2, 4, 8 of 15 and their reverse; the log-normaliser is ln 15 twice.
  np.testing.assert_allclose(stats.prob_sum_E, np.array([9, 6, 6, 9]) / 15, rtol=1e-6)
  np.testing.assert_allclose(stats.z_sum, 2 * np.log(15) ** 2, rtol=1e-6)
  p = np.array([1, 2, 4, 8]) / 15
  np.testing.assert_allclose(stats.entropy_sum, -2 * (p * np.log(p)).sum(), rtol=1e-6)


@pytest.mark.parametrize("counts", [[1, 2, 1], [2, 1, 0]])
def test_topk_replays_counts(make_context, counts):
  context = make_context(3, 4, dim=4, decisions=Decisions(count_T=jnp.asarray(counts)))
  assignment, stats = TopK(RoutingConfig(method="topk", k=2, standardise=False))(
    {"router_DE": jnp.eye(4)}, LOGITS, context
  )
  np.testing.assert_array_equal(assignment.valid_TK.sum(1), counts)
  np.testing.assert_array_equal(stats.count_T, counts)
