"""One training step: accumulation, skipped updates, twins, schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.train.losses import compute_loss, num_twins
from moe_lab.train.metrics import merge, summarise
from moe_lab.train.optimizer import learning_rate_schedule, make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

CONFIG = Config(
  model=ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, expert_dim=8),
  routing=RoutingConfig(k_max=4, warmup_steps=0, learner="leave_one_out"),
  data=DataConfig(vocab_size=32, seq_len=12),
  train=TrainConfig(steps=20, batch_size=8, warmup_steps=4, learning_rate=1e-2),
)
TOPK = dataclasses.replace(CONFIG, routing=RoutingConfig(method="topk", k=2))


def with_train(config, **fields):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def random_batch(seed=0, rows=8):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 32, (rows, 13)).astype(np.int32)
  return Batch(tokens, np.ones_like(tokens), np.zeros_like(tokens))


def parts(config):
  optimizer = make_optimizer(config.train)
  return make_train_step(config, Transformer(config), optimizer), initial_state(config, optimizer)


def test_accumulation_gives_the_same_step():
  # With a fixed count nothing is sampled; the balance loss, not linear in the batch, is off.
  config = dataclasses.replace(TOPK, routing=RoutingConfig(method="topk", k=2, load_balance_weight=0.0))
  results = []
  for accumulate in (1, 4):
    step, state = parts(with_train(config, accumulate=accumulate))
    state, metrics = step(state, random_batch())
    results.append((state.params, summarise(metrics)))
  # Adam divides by the gradient's size: where that is rounding error, so is the update's direction.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), results[0][0], results[1][0])
  assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-5)
  assert results[0][1]["load"] == results[1][1]["load"]


def test_training_lowers_the_loss_and_holds_the_budget():
  step, state = parts(with_train(CONFIG, steps=60))
  total, first = None, None
  for _ in range(60):
    state, metrics = step(state, random_batch())
    first = first or summarise(metrics)["loss"]
    total = metrics if total is None else merge(total, metrics)
  assert summarise(metrics)["loss"] < first - 0.5
  assert summarise(total)["mean_experts"] == pytest.approx(CONFIG.routing.budget, rel=0.05)
  assert int(state.step) == 60 and int(state.skipped_in_a_row) == 0


def test_a_bad_gradient_changes_nothing_but_the_counters():
  step, state = parts(CONFIG)
  poisoned = state._replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
  before = jax.tree.map(np.array, poisoned)
  after, metrics = step(poisoned, random_batch())
  assert int(after.skipped_in_a_row) == 1 and int(after.step) == 1 and summarise(metrics)["skipped"] == 1
  untouched = after._replace(step=before.step, skipped_in_a_row=before.skipped_in_a_row)
  jax.tree.map(np.testing.assert_array_equal, untouched, before)


def test_a_spike_changes_nothing_but_the_counters():
  train = dataclasses.replace(CONFIG.train, spike_factor=3.0)
  step, state = parts(dataclasses.replace(CONFIG, train=train))

  def stepped(usual, number):
    """The step after `number` others, whose gradients were so long; draws go by the number."""
    before = state._replace(step=jnp.int32(number), usual_norm=jnp.float32(usual))
    return step(jax.tree.map(jnp.copy, before), random_batch())

  norm = float(stepped(1e9, 50)[1].grad_norm)
  for usual, number, skipped in ((norm / 3.1, 50, 1), (norm / 2.9, 50, 0), (norm / 100, 49, 0), (0.0, 0, 0)):
    after, metrics = stepped(usual, number)
    assert (int(after.skipped_in_a_row), float(metrics.skipped)) == (skipped, skipped)
    found = float(metrics.grad_norm)
    expected = usual if skipped else usual + (found - usual) / 50 if usual else found
    assert float(after.usual_norm) == pytest.approx(expected, rel=1e-5)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, state.params))
    assert any(moved) == (not skipped)


def test_the_counters_of_two_steps_add_up():
  step, state = parts(TOPK)
  state, first = step(state, random_batch(0))
  _, second = step(state, random_batch(1))
  both = summarise(merge(first, second))
  # The mean of equal numbers of tokens is the mean of the means.
  assert both["loss"] == pytest.approx((summarise(first)["loss"] + summarise(second)["loss"]) / 2, rel=1e-6)
  assert both["mean_experts"] == 2.0


def test_twins_count_half_and_padding_not_at_all():
  # 8 rows of 12 targets; the first 2 run twice: loss_weight stays 8 * 12, tokens are 10 * 12.
  assert num_twins(CONFIG, 8) == 2
  model, state = Transformer(CONFIG), initial_state(CONFIG, make_optimizer(CONFIG.train))
  batch = random_batch()
  _, metrics = compute_loss(state.params, state, batch, jax.random.key(0), CONFIG, model)
  assert float(metrics.loss_weight) == 96 and float(metrics.token_count) == 120
  assert float(metrics.advantage_count) == 2 * 2 * 12
  segments = batch.segments.copy()
  segments[:, 6:] = 0  # of 13: inputs 0..5 are real, targets 1..5 count
  _, metrics = compute_loss(state.params, state, batch._replace(segments=segments), jax.random.key(0), CONFIG, model)
  assert float(metrics.loss_weight) == 40 and float(metrics.token_count) == 60


def test_the_policy_learns_only_after_the_warm_up():
  config = dataclasses.replace(CONFIG, routing=dataclasses.replace(CONFIG.routing, warmup_steps=2))
  step, state = parts(config)
  start = np.array(state.params["moe_layers"]["moe"]["policy_out"])
  for index in range(3):
    state, _ = step(state, random_batch(index))
    moved = not np.array_equal(state.params["moe_layers"]["moe"]["policy_out"], start)
    assert moved == (index >= 2)


def test_value_baseline_trains_its_head():
  config = dataclasses.replace(CONFIG, routing=dataclasses.replace(CONFIG.routing, learner="value"))
  assert num_twins(config, 8) == 0
  step, state = parts(config)
  losses = []
  for _ in range(30):
    state, metrics = step(state, random_batch())
    losses.append(summarise(metrics)["loss_value"])
  assert losses[-1] < 0.5 * losses[0]


def test_schedule():
  # Warm-up 1/4, 2/4, 3/4, 4/4 of the peak; then a cosine to a tenth of it over the other 16 steps.
  schedule = learning_rate_schedule(TrainConfig(steps=20, warmup_steps=4, learning_rate=1.0))
  np.testing.assert_allclose([schedule(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  assert schedule(12) == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
  assert schedule(20) == pytest.approx(0.1)


def test_a_model_without_experts_trains():
  config = dataclasses.replace(TOPK, model=dataclasses.replace(TOPK.model, num_dense_layers=2, qkv_bias=True))
  step, state = parts(with_train(config, steps=20))
  losses = []
  for _ in range(20):
    state, metrics = step(state, random_batch())
    losses.append(summarise(metrics))
  assert losses[-1]["loss"] < 0.8 * losses[0]["loss"] and losses[0]["mean_experts"] == 0
  assert all(np.isfinite(value) for value in losses[-1].values() if isinstance(value, float))
