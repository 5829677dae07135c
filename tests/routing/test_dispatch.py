"""Every way of moving rows to experts is the same function; capacity alone drops rows, and only the later ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops import native
from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.routing.base import Assignment
from moe_lab.routing.dispatch import dispatch, sort_rows

TOKENS, DIM, EXPERTS, HIDDEN, SLOTS = 23, 6, 5, 7, 3
WAYS = {
  "dense": dict(backend="dense"),
  "capacity": dict(backend="capacity", capacity=TOKENS),  # room for all tokens on one expert
  "tiles": dict(backend="ragged", experts="tiles", tiles=(16, 4)),
  "one_tile": dict(backend="ragged", experts="tiles", tiles=(32,)),
  "ragged_dot": dict(backend="ragged", experts="ragged_dot"),
  "reference": dict(backend="ragged", experts="reference"),
  "auto": dict(backend="auto"),
}
if native.available():  # where there is a C++ compiler
  WAYS["native"] = dict(backend="ragged", experts="native")


def random_assignment(seed, valid_TK, first_expert=None):
  """Distinct experts for each token; gates are random and not normalised."""
  rng = np.random.default_rng(seed)
  expert_TK = np.stack([rng.permutation(EXPERTS)[:SLOTS] for _ in range(TOKENS)])
  if first_expert is not None:
    expert_TK = np.stack([np.roll(np.arange(EXPERTS), -first_expert)[:SLOTS]] * TOKENS)
  gate_TK = np.where(valid_TK, rng.uniform(0.1, 1, (TOKENS, SLOTS)), 0)
  return Assignment(jnp.asarray(expert_TK, jnp.int32), jnp.asarray(gate_TK, jnp.float32), jnp.asarray(valid_TK))


def first_slots(count_T):
  return np.arange(SLOTS) < np.broadcast_to(count_T, TOKENS)[:, None]


ASSIGNMENTS = {
  "random_counts": random_assignment(0, first_slots(np.random.default_rng(1).integers(0, SLOTS + 1, TOKENS))),
  "all_slots": random_assignment(2, first_slots(SLOTS)),
  "all_on_one_expert": random_assignment(3, first_slots(1), first_expert=EXPERTS - 1),
  "two_experts_empty": random_assignment(4, first_slots(SLOTS), first_expert=1),
  "no_slot_valid": random_assignment(5, first_slots(0)),
  "one_token": random_assignment(6, first_slots(np.arange(TOKENS) == TOKENS - 1)),
}


def random_inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = ((EXPERTS, DIM, HIDDEN), (EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN, DIM))
  weights = ExpertWeights(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)))
  return *(jax.random.normal(key, (TOKENS, DIM)).astype(dtype) for key in keys[3:]), weights


@functools.partial(jax.jit, static_argnames=("backend", "capacity", "tiles", "experts"))
def values_and_gradients(x_TD, dy_TD, weights, assignment, **way):
  def run(x_TD, weights, gate_TK):
    return dispatch(x_TD, assignment._replace(gate_TK=gate_TK), weights, **way)

  y_TD, backward, dropped = jax.vjp(run, x_TD, weights, assignment.gate_TK, has_aux=True)
  return y_TD, dropped, backward(dy_TD)


def by_loops(x_TD, weights, assignment, capacity=TOKENS):
  """The definition in float64: each valid row once, first come first served."""
  x_TD, (gate, up, down) = np.asarray(x_TD, np.float64), (np.asarray(w, np.float64) for w in weights)
  y_TD, rows_E, dropped = np.zeros_like(x_TD), np.zeros(EXPERTS, int), 0
  for t, k in np.ndindex(TOKENS, SLOTS):
    if assignment.valid_TK[t, k]:
      e = int(assignment.expert_TK[t, k])
      rows_E[e] += 1
      if rows_E[e] > capacity:
        dropped += 1
        continue
      a = x_TD[t] @ gate[e]
      y_TD[t] += float(assignment.gate_TK[t, k]) * (a / (1 + np.exp(-a)) * (x_TD[t] @ up[e])) @ down[e]
  return y_TD, dropped


@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_values(way, name):
  x_TD, dy_TD, weights = random_inputs()
  y_TD, dropped, _ = values_and_gradients(x_TD, dy_TD, weights, ASSIGNMENTS[name], **WAYS[way])
  np.testing.assert_allclose(y_TD, by_loops(x_TD, weights, ASSIGNMENTS[name])[0], atol=2e-5)
  assert dropped == 0 and dropped.dtype == jnp.float32


@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "dense"])
def test_gradients_equal_dense(way, name):
  case = (*random_inputs(), ASSIGNMENTS[name])
  *_, (dx_TD, d_weights, d_gate_TK) = values_and_gradients(*case, **WAYS[way])
  *_, (want_dx_TD, want_d_weights, want_d_gate_TK) = values_and_gradients(*case, **WAYS["dense"])
  np.testing.assert_allclose(dx_TD, want_dx_TD, atol=5e-5)
  np.testing.assert_allclose(d_gate_TK, want_d_gate_TK, atol=5e-5)
  for got, want in zip(d_weights, want_d_weights, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)
  # Slots that are not valid learn nothing, valid ones do.
  np.testing.assert_array_equal(np.asarray(d_gate_TK) != 0, ASSIGNMENTS[name].valid_TK)


@pytest.mark.parametrize("name", ["random_counts", "all_slots", "all_on_one_expert", "two_experts_empty"])
@pytest.mark.parametrize("capacity", [1, 4, 9])
def test_capacity_drops_the_later_rows_and_counts_them(capacity, name):
  x_TD, dy_TD, weights = random_inputs()
  assignment = ASSIGNMENTS[name]
  y_TD, dropped, gradients = values_and_gradients(
    x_TD, dy_TD, weights, assignment, backend="capacity", capacity=capacity
  )
  want, want_dropped = by_loops(x_TD, weights, assignment, capacity)
  np.testing.assert_allclose(y_TD, want, atol=2e-5)
  assert dropped == want_dropped
  assert (dropped > 0) == (name != "random_counts" or capacity < 9)  # 36 random rows over five experts: never ten
  if name == "all_on_one_expert":  # 23 tokens on one expert: exactly the first C are served
    assert dropped == TOKENS - capacity
    np.testing.assert_array_equal(np.any(y_TD, axis=1), np.arange(TOKENS) < capacity)
    np.testing.assert_array_equal(np.any(gradients[0], axis=1), np.arange(TOKENS) < capacity)
    np.testing.assert_array_equal(gradients[2][:, 0] != 0, np.arange(TOKENS) < capacity)


@pytest.mark.parametrize("way", WAYS)
def test_each_valid_row_is_combined_once(way):
  # D = F = 1, x = 1: expert e gives silu(30) * 10^e / 30 = 10^e. With gates of one, the digits of a token's result
  # count how often each expert's row was added: 10^0 + 10^3 = 1001 for experts 0 and 3.
  weights = ExpertWeights(
    gate_EDF=jnp.full((EXPERTS, 1, 1), 30.0),
    up_EDF=jnp.full((EXPERTS, 1, 1), 1 / 30),
    down_EFD=10.0 ** jnp.arange(EXPERTS).reshape(EXPERTS, 1, 1),
  )
  for assignment in ASSIGNMENTS.values():
    ones = assignment._replace(gate_TK=jnp.ones((TOKENS, SLOTS)))  # of invalid slots too: they must not count
    y_TD, _ = jax.jit(dispatch, static_argnames=("backend", "capacity", "tiles", "experts"))(
      jnp.ones((TOKENS, 1)), ones, weights, **WAYS[way]
    )
    want_T = (10 ** np.asarray(assignment.expert_TK) * np.asarray(assignment.valid_TK)).sum(1)
    np.testing.assert_allclose(y_TD[:, 0], want_T, rtol=1e-6)


@pytest.mark.parametrize("experts", ["tiles", "ragged_dot"])
@pytest.mark.parametrize("num_tokens, num_experts, slots", [(1, 1, 1), (3, 7, 2), (8, 8, 1), (9, 2, 2), (17, 4, 4)])
def test_ragged_has_room_for_every_slot(num_tokens, num_experts, slots, experts):
  assignment = Assignment(
    jnp.arange(num_tokens * slots).reshape(num_tokens, slots) % num_experts,
    jnp.ones((num_tokens, slots)),
    jnp.ones((num_tokens, slots), bool),
  )
  weights = ExpertWeights(*(jnp.ones((num_experts, 1, 1)) for _ in range(3)))
  x_TD = jnp.arange(1.0, num_tokens + 1)[:, None]
  y_TD, _ = dispatch(x_TD, assignment, weights, backend="ragged", experts=experts, tiles=(8, 4))
  np.testing.assert_allclose(y_TD, slots * jax.nn.silu(x_TD) * x_TD, rtol=1e-6)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_rows_are_sorted_by_expert_and_then_by_token(name):
  assignment = ASSIGNMENTS[name]
  rows = sort_rows(assignment, EXPERTS)
  pairs = [
    t * SLOTS + k
    for e in range(EXPERTS)
    for t, k in np.ndindex(TOKENS, SLOTS)
    if assignment.valid_TK[t, k] and assignment.expert_TK[t, k] == e
  ]
  np.testing.assert_array_equal(rows.pair_R[: len(pairs)], pairs)
  assert sorted(np.asarray(rows.pair_R)) == list(range(TOKENS * SLOTS)) and rows.rows_E.sum() == len(pairs)
  # With so many experts that one number can not hold a row's expert and pair, two arrays are sorted.
  wide = sort_rows(assignment, 2**27)
  np.testing.assert_array_equal(wide.pair_R, rows.pair_R)


@pytest.mark.parametrize("way", ["dense", "capacity", "tiles", "ragged_dot"])
def test_bfloat16_stays_near_float32(way):
  x_TD, dy_TD, weights = random_inputs(jnp.bfloat16)
  y_TD, _, gradients = values_and_gradients(x_TD, dy_TD, weights, ASSIGNMENTS["random_counts"], **WAYS[way])
  exact = (x_TD.astype(jnp.float32), dy_TD.astype(jnp.float32), weights, ASSIGNMENTS["random_counts"])
  want_y_TD, _, want_gradients = values_and_gradients(*exact, **WAYS["dense"])
  assert y_TD.dtype == jnp.bfloat16 and gradients[1].gate_EDF.dtype == gradients[2].dtype == jnp.float32
  # Weights, products and gated rows are each rounded to 2^-9 of their size.
  for got, want in zip(jax.tree.leaves((y_TD, gradients)), jax.tree.leaves((want_y_TD, want_gradients)), strict=True):
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02 * np.abs(want).max())


def test_a_wrong_name_fails():
  x_TD, _, weights = random_inputs()
  with pytest.raises(ValueError, match="sparse.*wanted auto, dense, capacity or ragged"):
    dispatch(x_TD, ASSIGNMENTS["all_slots"], weights, backend="sparse")
