"""The count policy's learner, its budget controller, balance and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing import balance
from moe_lab.routing import budget as budget_control
from moe_lab.routing.base import Assignment, PolicyTerms
from moe_lab.routing.dropout import dropped_experts
from moe_lab.routing.dynamic import with_soft_count
from moe_lab.routing.learner import Rollouts, clipped_lesson, lesson
from moe_lab.routing.policy_gradient import credited_loss, leave_one_out_advantage, policy_losses


def test_credit_flows_back_within_a_document_only():
  rng = np.random.default_rng(0)
  nll, weight = rng.random((2, 9)), rng.integers(0, 2, (2, 9)).astype(float)
  segment = np.array([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2])
  want = np.zeros_like(nll)
  for b, t in np.ndindex(2, 9):
    for ahead in range(9 - t):
      if segment[b, t + ahead] != segment[b, t]:
        break
      want[b, t] += 0.5**ahead * nll[b, t + ahead] * weight[b, t + ahead]
  got = credited_loss(jnp.asarray(nll), jnp.asarray(weight), jnp.asarray(segment), 0.5)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_leave_one_out_by_hand():
  # Rows 0 and 1 have twins 3 and 4; row 2 is alone. Twin's loss minus own: 5 - 1 and 2 - 2; the twins' the negative.
  credit_BL = jnp.asarray([[1.0], [2.0], [7.0], [5.0], [2.0]])
  np.testing.assert_array_equal(leave_one_out_advantage(credit_BL, 2)[:, 0], [4, 0, 0, -4, 0])


def test_the_policy_gradient_is_unbiased():
  # One token, counts 1..3 with rewards r and price c: averaged over what could be drawn, the sampled gradient is
  # that of the expectation E[-r/scale + c/scale * k], whatever the baseline.
  reward_A, price, scale, baseline = jnp.asarray([0.3, -1.0, 2.0]), 0.7, 2.0, 5.0
  counts_A, one = jnp.arange(1.0, 4.0), jnp.ones(1)

  def sampled(logits_A, action):
    log_prob_A = jax.nn.log_softmax(logits_A)
    expected = (jnp.exp(log_prob_A) @ counts_A)[None, None]
    terms = PolicyTerms(log_prob_A[action][None, None], expected, one[None], one[None], None)
    losses = policy_losses(terms, (reward_A[action] - baseline)[None], one, one, price, scale, 0.0)
    return losses["policy"] + losses["price"]

  def exact(logits_A):
    return jax.nn.softmax(logits_A) @ (-reward_A + price * counts_A) / scale

  logits_A = jnp.asarray([0.1, -0.4, 0.8])
  mean = sum(p * jax.grad(sampled)(logits_A, a) for a, p in enumerate(jax.nn.softmax(logits_A)))
  np.testing.assert_allclose(mean, jax.grad(exact)(logits_A), atol=1e-6)


def test_leave_one_out_over_two_tokens_is_unbiased():
  # The first token's loss follows from its count, the second's from both; with discount 1 a decision is credited with
  # all that it touches. Over the 16 outcomes of two rollouts of two tokens with two counts the mean gradient must be
  # that of the expected loss: 1/4 (the mean over tokens) of two rollouts' worth, in units of the scale.
  first_A, second_AA, scale = jnp.asarray([0.5, 1.5]), jnp.asarray([[0.2, 2.0], [1.0, -0.7]]), 0.5
  ones = jnp.ones(4)

  def sampled(logits_LA, action_BL):
    log_prob_LA = jax.nn.log_softmax(logits_LA)
    log_prob_T = log_prob_LA[jnp.arange(2), action_BL].reshape(-1)
    nll_BL = jnp.stack([first_A[action_BL[:, 0]], second_AA[action_BL[:, 0], action_BL[:, 1]]], axis=1)
    credit_BL = credited_loss(nll_BL, jnp.ones((2, 2)), jnp.ones((2, 2), jnp.int32), 1.0)
    advantage_T = leave_one_out_advantage(credit_BL, 1).reshape(-1)
    terms = PolicyTerms(log_prob_T[None], ones[None], ones[None], ones[None], None)
    chance = jax.lax.stop_gradient(jnp.exp(log_prob_T.sum()))
    return chance * policy_losses(terms, advantage_T, ones, ones, 0.0, scale, 0.0)["policy"]

  def exact(logits_LA):
    first, second = jax.nn.softmax(logits_LA)
    return (first @ first_A + first @ second_AA @ second) / (2 * scale)

  logits_LA = jnp.asarray([[0.3, -0.5], [1.0, 0.2]])
  outcomes = jnp.asarray(list(np.ndindex(2, 2, 2, 2))).reshape(16, 2, 2)
  gradient = jax.jit(jax.grad(lambda logits: jax.vmap(sampled, (None, 0))(logits, outcomes).sum()))
  np.testing.assert_allclose(gradient(logits_LA), jax.grad(exact)(logits_LA), atol=1e-6)


def test_entropy_floor_acts_on_a_layers_mean_and_only_below():
  # Layer 0 has entropies 0.2 and 0.4 of two real tokens (the third is padding): mean 0.3, 0.2 under the floor of 0.5.
  entropy_ZT = jnp.asarray([[0.2, 0.4, 0.0], [0.9, 0.3, 0.0]])
  zero_ZT, ones = jnp.zeros((2, 3)), jnp.ones(3)
  terms = PolicyTerms(zero_ZT, zero_ZT, entropy_ZT, zero_ZT, None)
  losses = policy_losses(terms, zero_ZT, ones, jnp.asarray([1.0, 1, 0]), 0.0, 1.0, 0.5)
  assert losses["entropy_floor"] == pytest.approx((0.2 + 0.0) / 2)


@pytest.mark.parametrize("mode", ["exactly", "at_most"])
@pytest.mark.parametrize("wish", [3.0, 1.2])  # the mean count that a free expert would lead to
def test_the_controller_holds_the_budget_of_a_policy_that_answers_late(mode, wish):
  config = RoutingConfig(budget=2.0, budget_mode=mode, lambda_min=0.002)
  state, count, scale = budget_control.initial_budget_state(config), 2.0, 0.1
  prices = []
  for _ in range(1500):
    price = float(budget_control.price(state, config))
    # The policy drifts to where its own gain, 0.1 nats per expert at `wish`, equals the price.
    count += 0.02 * ((wish - price * 10) - count)
    state = budget_control.updated(state, config, count, scale)
    prices.append(price)
  if mode == "exactly":
    assert count == pytest.approx(2.0, rel=0.02)
    assert (prices[-1] < 0) == (wish < 2)  # below the budget experts are paid for
  else:
    assert count <= 2.0
    assert min(prices) >= 0.002 - 1e-9
    if wish < 2:
      assert prices[-1] == pytest.approx(0.002) and count == pytest.approx(wish - 0.02, rel=0.01)
    else:
      assert count == pytest.approx(1.96, rel=0.02)  # two per cent under


def test_slack_gives_credit_only_where_the_budget_is_met_exactly():
  # One step at 1 expert of 2: the mean goes to 0.8 * 2 + 0.2 * 1 = 1.8. Exactly: the integral moves by
  # 0.02 * (1.8 - 2) / 2 = -0.002, the pressure is -0.002 - 0.1, the price that times 0.5 nats. At most: no credit.
  for mode, integral, price in (("exactly", -0.002, -0.051), ("at_most", 0.0, 0.002)):
    config = RoutingConfig(budget=2.0, budget_mode=mode, lambda_min=0.002)
    state = budget_control.updated(budget_control.initial_budget_state(config), config, 1.0, 0.5)
    assert state.mean == pytest.approx(1.8) and state.integral == pytest.approx(integral, abs=1e-8)
    assert budget_control.price(state, config) == pytest.approx(price, rel=1e-5)


def rollouts_of(credit_BL, twins):
  """Rollouts of sequences of one token, so that a token's credit is its loss."""
  ones = jnp.ones(credit_BL.shape)
  return Rollouts(credit_BL, ones, ones.astype(jnp.int32), jnp.full(credit_BL.shape[0], 2.0), twins)


@pytest.mark.parametrize(
  "learner, advantage, decisions",
  [
    ("leave_one_out", [4, 0, -4, 0], 4),  # rows 0 and 1 have twins 3 and 4; row 2 is alone
    ("greedy", [4, 0, 0, 0], 2),  # the twins took the greedy counts, and teach nothing
    ("none", [-1, -2, -7, -5, -2], 5),
    ("value", [2, 1, -4, -2, 1], 5),  # the value head says 3 everywhere
  ],
)
def test_what_each_learner_takes_for_advantage(learner, advantage, decisions):
  # The policy loss is minus the mean of advantage * log-probability; log-probabilities 1 10 100 ... tell who taught.
  credit_BL = jnp.asarray([[1.0], [2.0], [7.0], [5.0], [2.0]])
  digits, zero = 10.0 ** jnp.arange(5)[None], jnp.zeros((1, 5))
  terms = PolicyTerms(digits, zero, zero + 99.0, zero, zero + 3.0)
  config = RoutingConfig(learner=learner)
  state = budget_control.initial_budget_state(config)._replace(scale=jnp.asarray(1.0))
  taught = lesson(terms, rollouts_of(credit_BL, 2), state, jnp.asarray(True), config)
  by_row = {"leave_one_out": [0, 1, 3, 4], "greedy": [0, 1, 3, 4]}.get(learner, range(5))
  want = -sum(a * 10.0**row for a, row in zip(advantage, by_row, strict=True)) / decisions
  assert taught.losses["policy"] == pytest.approx(want, rel=1e-5)
  assert taught.advantage_count == decisions
  assert taught.advantage_square == pytest.approx(sum(a**2 for a in advantage))
  if learner == "value":
    assert taught.losses["value"] == pytest.approx((4 + 1 + 16 + 4 + 1) / 5)


def test_ppo_by_hand():
  # Advantages in units of the scale: value 3 minus losses 1 and 5, over 0.5: 4 and -4. Ratios e^0.3 = 1.35 and
  # e^-0.3 = 0.741, both beyond the clip: the first is held at 1.2 * 4, the second at 0.8 * -4: -mean = -0.8.
  credit_BL, zero = jnp.asarray([[1.0], [5.0]]), jnp.zeros((1, 2))
  old = PolicyTerms(zero - 1.0, zero + 2.0, zero + 99.0, zero, zero + 3.0)
  config = RoutingConfig(learner="ppo")
  state = budget_control.initial_budget_state(config)._replace(scale=jnp.asarray(0.5))

  def loss(log_prob_ZT, value_ZT):
    terms = old._replace(log_prob_T=log_prob_ZT, value_T=value_ZT)
    return clipped_lesson(terms, old, rollouts_of(credit_BL, 0), state, config)

  moved = jnp.asarray([[-0.7, -1.3]])
  # The value head's squared errors are 4 and 4; the price is 0 at the budget.
  assert loss(moved, zero + 3.0) == pytest.approx(4 - (1.2 * 4 - 0.8 * 4) / 2, rel=1e-5)
  assert not jax.grad(loss)(moved, zero + 3.0).any()  # beyond the clip nothing is to be gained
  # At ratio one it is REINFORCE: minus the advantage, over two tokens.
  np.testing.assert_allclose(jax.grad(loss)(old.log_prob_T, zero + 3.0), [[-2.0, 2.0]], rtol=1e-5)


def test_straight_through_lets_the_loss_reach_the_count():
  # Counts 1, 2, 3 with relaxed probabilities q: the gate of slot j has the gradient of P(count > j).
  perturbed_TA = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
  assignment = Assignment(jnp.asarray([[0, 1, 2]]), jnp.asarray([[0.6, 0.3, 0.0]]), jnp.asarray([[True, True, False]]))

  def worth(perturbed_TA, learning):
    return with_soft_count(assignment, perturbed_TA, 1, learning).gate_TK @ jnp.asarray([5.0, 7.0, 9.0])

  value, gradient = jax.value_and_grad(lambda x: worth(x, True)[0])(perturbed_TA)
  assert value == pytest.approx(0.6 * 5 + 0.3 * 7)
  # P(count > 0) is 1 and constant; P(count > 1) = q2 + q3 = 0.5: its slope by the logits is -q1 / 2, q2 / 2, q3 / 2;
  # slot 2 was not taken. Times 0.3 * 7.
  np.testing.assert_allclose(gradient[0], 2.1 * np.array([-0.25, 0.15, 0.1]), rtol=1e-5)
  assert not jax.grad(lambda x: worth(x, False)[0])(perturbed_TA).any()


def test_straight_through_is_priced_in_nats():
  config = RoutingConfig(learner="straight_through")
  state = budget_control.initial_budget_state(config)._replace(scale=jnp.asarray(0.1), integral=jnp.asarray(2.0))
  terms = PolicyTerms(*(jnp.full((1, 5), x) for x in (0.0, 3.0, 99.0, 0.0)), None)
  taught = lesson(terms, rollouts_of(jnp.ones((5, 1)), 0), state, jnp.asarray(True), config)
  assert "policy" not in taught.losses and taught.total == pytest.approx(0.1 * 2.0 * 3.0)
  mean_square = taught.advantage_square / taught.advantage_count
  assert budget_control.updated_scale(jnp.zeros(()), mean_square) == pytest.approx(0.1)


def test_the_scale_starts_with_the_first_observation():
  assert budget_control.updated_scale(jnp.zeros(()), 0.25) == 0.5
  assert budget_control.updated_scale(jnp.asarray(1.0), 4.0) == pytest.approx(0.95 + 0.05 * 2)


def test_load_balance_loss_by_hand():
  even, token_count = jnp.full((1, 4), 10.0), jnp.asarray([20.0])
  assert balance.load_balance_loss(even, jnp.full((1, 4), 5.0), token_count) == pytest.approx(1.0)
  one = jnp.asarray([[40.0, 0, 0, 0]])
  assert balance.load_balance_loss(one, jnp.asarray([[20.0, 0, 0, 0]]), token_count) == pytest.approx(4.0)  # E


def test_bias_moves_against_the_load_and_does_not_drift():
  # Loads 2, 1, 0.5, 0.5 of the fair share: steps -1, 0, +1, +1 of 0.1; their mean, 0.025, is taken out.
  bias = balance.updated_bias(jnp.zeros((1, 4)), jnp.asarray([[8.0, 4, 2, 2]]), 0.1)
  np.testing.assert_allclose(bias[0], [-0.125, -0.025, 0.075, 0.075], atol=1e-7)
  # Load shares 3.2, 0.4, 0.4, 0 times E = 4: 0.95 * 1 + 0.05 * share.
  load = balance.updated_load(jnp.ones((1, 4)), jnp.asarray([[8.0, 1, 1, 0]]))
  np.testing.assert_allclose(load[0], [0.95 + 0.05 * 3.2, 0.97, 0.97, 0.95], rtol=1e-6)


def test_expert_dropout_prefers_the_busy_and_leaves_enough():
  load_E = jnp.asarray([2.0, 1.0, 0.5, 0.5])
  keys = jax.random.split(jax.random.key(0), 4000)
  dropped = jax.vmap(lambda key: dropped_experts(key, load_E, 0.2, 1))(keys)
  np.testing.assert_allclose(dropped.mean(0), [0.4, 0.2, 0.1, 0.1], atol=0.03)
  crowded = jax.vmap(lambda key: dropped_experts(key, load_E * 4, 0.5, 3))(keys)
  assert crowded.sum(1).max() == 1  # of four experts three stay
