"""The value of an expert from its gate's slope: numbers by hand, what learns, and the price."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.routing.base import Observed
from moe_lab.routing.curvature import START, CurvatureValued, even_odds, observe_value
from moe_lab.routing.registry import make_router
from moe_lab.routing.selection import assign

# Gates that don't depend on the count, and logits as they are, for numbers by hand.
CONFIG = RoutingConfig(learner="curvature", k_max=4, warmup_steps=10, gate="softmax_chosen", standardise=False)


def zeros_of(router, dim):
  shapes = router.parameters(ModelConfig(dim=dim, num_experts=6))
  return {name: jnp.zeros(shape) for name, (shape, _) in shapes.items()}


def test_the_heads_gradient_by_hand():
  # Two tokens; the mean loss has slopes 3 and -1 in the last gates 0.5 and 0.25. Scaled to a token's own loss the
  # slopes in m are 3 * 0.5 * 2 = 3 and -0.5, the targets 4.5 and 0.125. Predicted values are 9 and 0.125: with two
  # slots observed the gradients are (1 - 0.5) / 2 and 0.
  gate = jnp.asarray([[0.5, 0.5], [0.75, 0.25]])
  last = jnp.asarray([[0.0, 1.0], [0.0, 1.0]])
  log_value = jnp.log(jnp.asarray([[7.0, 9.0], [7.0, 0.125]]))
  slope = jnp.asarray([[5.0, 3.0], [2.0, -1.0]])
  got = jax.vjp(observe_value, gate, jnp.ones((2, 2)), log_value, last, jnp.asarray(2.0))
  np.testing.assert_array_equal(got[0], gate)
  d_gate, _, d_log_value, _, _ = got[1](slope)
  np.testing.assert_array_equal(d_gate, slope)
  np.testing.assert_allclose(d_log_value, [[0, 0.25], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("gate", ["softmax_unit", "softmax_kept"])
def test_the_target_is_what_leaving_out_the_last_expert_does_to_a_linear_loss(gate):
  # Gates that keep their length: without the last expert the others' grow. For a loss linear in the output the first
  # order is all there is.
  rng = np.random.default_rng(1)
  logits_TE, output_TKD, slope_TD = rng.normal(size=(5, 6)), rng.normal(size=(5, 3, 4)), rng.normal(size=(5, 4))
  expert_TK = np.argsort(-logits_TE, axis=1)[:, :3]
  router = make_router(dataclasses.replace(CONFIG, gate=gate))

  def gates(count):
    counts = jnp.full(5, count)
    return assign(jnp.asarray(logits_TE), jnp.asarray(expert_TK), counts, jnp.ones(5, bool), gate).gate_TK

  def loss_T(gate_TK):
    return jnp.einsum("TK,TKD,TD->T", gate_TK, output_TKD, slope_TD)

  gate_TK, last_TK = gates(3), jnp.zeros((5, 3)).at[:, 2].set(1)
  rise_T = loss_T(gates(2)) - loss_T(gate_TK)
  targets = jnp.log(0.5 * jnp.square(rise_T))[:, None] * jnp.ones((5, 3))
  inputs = gate_TK, router._growth(gate_TK), targets, last_TK, jnp.asarray(1.0)
  slopes = jax.grad(lambda gate_TK: loss_T(gate_TK).sum())(gate_TK)
  d_log_value = jax.vjp(observe_value, *inputs)[1](slopes)[2]
  np.testing.assert_allclose(d_log_value, 0, atol=1e-5)  # the head that predicts it rests
  without_growth = jax.vjp(observe_value, gate_TK, jnp.ones((5, 3)), *inputs[2:])[1](slopes)[2]
  assert np.abs(without_growth).max() > 1e-2


def test_the_head_finds_the_rise_of_the_loss_where_an_expert_is_left_out():
  # A calibrated model: targets are drawn from its own softmax. The mean of half the squared slope over targets is
  # the divergence that leaving out a small part of the logits causes, exactly so to second order.
  rng = np.random.default_rng(0)
  logits, part = rng.normal(size=5), 0.05 * rng.normal(size=5)
  p = np.exp(logits) / np.exp(logits).sum()
  slope_of_target = p @ part - part  # d/dm of -log softmax(logits + (m - 1) part)[target] at m = 1
  without = np.exp(logits - part) / np.exp(logits - part).sum()
  rise = (p * np.log(p / without)).sum()
  assert p @ (0.5 * slope_of_target**2) == pytest.approx(rise, rel=0.05)


@pytest.mark.parametrize("budget", [1.05, 2.0, 3.5])
def test_untrained_counts_hold_the_budget(make_context, budget):
  router = make_router(dataclasses.replace(CONFIG, budget=budget))
  assert isinstance(router, CurvatureValued)
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 6))
  parameters = zeros_of(router, 8)
  context = make_context(4000, 6, key=jax.random.key(0), state=state)
  _, stats = router(parameters, jnp.ones((4000, 8)), context)
  assert stats.count_T.mean() == pytest.approx(budget, abs=0.07)
  np.testing.assert_allclose(stats.policy.expected_count_T, budget, atol=2e-3)
  # Going on with probability p at each of three counts: 1 + p + p^2 + p^3.
  p = 1 / (1 + np.exp(-even_odds(np.asarray(budget), 1, 4)))
  assert 1 + p + p**2 + p**3 == pytest.approx(budget, abs=1e-3)


def test_the_greedy_count_is_the_first_value_below_the_price(make_context):
  router = make_router(CONFIG)
  # The head reads the hidden state's first three columns off as log values over START: values 2, 1, 3 at a price of
  # 1.5 stop after the first, since the second is not worth it; the third is never asked.
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 6))
  state = state._replace(method=state.method | {"threshold": jnp.asarray(1.5)})
  above_TS = jnp.asarray([[2.0, 1.0, 3.0], [1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [2.0, 3.0, 1.0]])
  parameters = zeros_of(router, 3)
  # silu(30 + x) is x + 30 to float32's precision; the output takes the 30 away through a unit of its own.
  parameters["policy_in"] = parameters["policy_in"].at[:3, :3].set(jnp.eye(3))
  parameters["policy_bias"] = parameters["policy_bias"].at[:4].set(30.0)
  parameters["policy_out"] = parameters["policy_out"].at[:3].set(jnp.eye(3)).at[3].set(-1.0)
  _, stats = router(parameters, above_TS, make_context(4, 6, dim=3, state=state))
  np.testing.assert_array_equal(stats.count_T, [2, 1, 4, 3])


def test_the_least_budget_gets_the_least_count(make_context):
  router = make_router(dataclasses.replace(CONFIG, budget_range=(1.0, 4.0)))
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 6))
  for key in (None, jax.random.key(0)):
    context = make_context(400, 6, key=key, state=state)
    context = context._replace(budget_T=jnp.where(jnp.arange(400) < 200, 1.0, 1.5))
    parameters = zeros_of(router, 8) | {"router_DE": jax.random.normal(jax.random.key(1), (8, 6))}
    _, stats = router(parameters, jax.random.normal(jax.random.key(2), (400, 8)), context)
    assert (stats.count_T[:200] == 1).all() and (stats.count_T[200:] > 1).any()


def test_greedy_counts_know_nothing_of_dropped_experts(make_context):
  router = make_router(dataclasses.replace(CONFIG, expert_dropout=0.4))
  rng = np.random.default_rng(0)
  parameters = {name: jnp.asarray(rng.normal(size=array.shape)) for name, array in zeros_of(router, 8).items()}
  x_TD = jnp.asarray(rng.normal(size=(200, 8)), jnp.float32)
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 6))
  level, price = 0.3, 1.2
  method = {"level": jnp.asarray(level), "price": jnp.asarray(price), "threshold": jnp.asarray(level + price)}
  state = state._replace(method=state.method | method)
  _, inference = router(parameters, x_TD, make_context(200, 6, state=state))
  assignment, training = router(parameters, x_TD, make_context(200, 6, key=jax.random.key(0), state=state))
  assert len(np.unique(assignment.expert_TK)) < 6  # some are dropped
  assert len(np.unique(inference.count_T)) > 2
  np.testing.assert_array_equal(training.policy.greedy_count_T, inference.count_T)


def test_the_value_falls_with_the_square_of_the_gate(make_context):
  router = make_router(CONFIG)
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 6))
  parameters = zeros_of(router, 6) | {"router_DE": jnp.eye(6)}
  # Shares of six experts: 0.5, 0.3 and 0.05 four times; the log of six times them, doubled, is 2.2, 1.2, -2.4.
  x_TD = jnp.log(jnp.asarray([[0.5, 0.3, 0.05, 0.05, 0.05, 0.05]]))
  counts = {1.3: 1, 1.1: 2, -2.3: 2, -2.5: 4}
  for price, count in counts.items():
    priced = state._replace(method=state.method | {"threshold": jnp.asarray(price)})
    _, stats = router(parameters, x_TD, make_context(1, 6, dim=6, state=priced))
    assert stats.count_T[0] == count
  # The control that sees the token's id alone does not see the gates either.
  blind = make_router(dataclasses.replace(CONFIG, policy_input="token"))
  parameters = zeros_of(blind, 6) | {"router_DE": jnp.eye(6)}
  priced = state._replace(method=state.method | {"threshold": jnp.asarray(-0.1)})
  assert blind(parameters, x_TD, make_context(1, 6, dim=6, state=priced))[1].count_T[0] == 4


def test_the_reported_price_is_in_nats():
  router = make_router(dataclasses.replace(CONFIG, budget=2.0))
  state = router.initial_state(3, 6)
  state = state._replace(method=state.method | {"threshold": jnp.full(3, 2.5)})
  assert router.price(state, None) == pytest.approx(np.exp(START + 2.5), rel=1e-6)


def test_only_the_head_learns_and_the_trunk_is_left_alone(make_context):
  router = make_router(CONFIG)
  model = ModelConfig(dim=8, num_experts=6)
  keys = iter(jax.random.split(jax.random.key(0), 9))
  parameters = {n: 0.5 * jax.random.normal(next(keys), s) for n, (s, _) in router.parameters(model).items()}
  state = jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 6))
  context = make_context(50, 6, key=next(keys), state=state)
  x_TD = jax.random.normal(next(keys), (50, 8))

  def gates(parameters, x_TD):
    return jnp.sum(jnp.square(router(parameters, x_TD, context)[0].gate_TK))

  def plain(parameters, x_TD):  # the same without the head: its policy is a constant to the gradient
    frozen = {n: jax.lax.stop_gradient(p) if n.startswith("policy") else p for n, p in parameters.items()}
    return gates(frozen, x_TD)

  (d, dx), (want, want_dx) = (jax.grad(f, (0, 1))(parameters, x_TD) for f in (gates, plain))
  np.testing.assert_array_equal(dx, want_dx)
  np.testing.assert_array_equal(d["router_DE"], want["router_DE"])
  assert d["policy_in"].any() and d["policy_out"].any()


def test_prices_follow_the_error_and_rest_where_nobody_asked():
  def seen(count, greedy):
    zero = jnp.zeros(())
    sums = {"log_value": jnp.asarray([10.0, 30.0])}  # of ten tokens
    ten = jnp.asarray(10.0)
    return Observed(jnp.ones(()), jnp.asarray(count), jnp.asarray(greedy), jnp.zeros((2, 6)), ten, sums, zero)

  router = make_router(CONFIG)
  state = router.initial_state(2, 6)
  new = router.updated_method_state(state, seen([3.0, 2.0], [1.0, 1.0]))
  # Sampled mean 2.5 of 2: an error of a quarter, at a rate of 0.3 times a sharpness of 4; greedy 1 of 2: minus a
  # half. Layers share one price.
  np.testing.assert_allclose(new["odds"] - state.method["odds"], [-0.3, -0.3], rtol=1e-4)
  np.testing.assert_allclose(new["price"], [-0.15] * 2, rtol=1e-6)
  np.testing.assert_allclose(new["level"], [0.2] * 2, rtol=1e-6)
  np.testing.assert_allclose(new["threshold"], [0.05 * 0.05] * 2, rtol=1e-5)  # a twentieth of 0.2 - 0.15
  rest = router.updated_method_state(state, seen([3.0, 2.0], [1.0, 1.0])._replace(asked=jnp.zeros(())))
  np.testing.assert_array_equal(rest["price"], state.method["price"])
  # As an upper bound the price never falls below the least one.
  bound = make_router(dataclasses.replace(CONFIG, budget_mode="at_most", lambda_min=0.01))
  new = bound.updated_method_state(bound.initial_state(2, 6), seen([1.0, 1.0], [1.0, 1.0]))
  np.testing.assert_allclose(new["price"] + new["level"] + START, np.log(0.01), rtol=1e-6)
