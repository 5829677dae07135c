"""Every method through the training step: finite, learns its router, holds its budget, replays, skips padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.routing import METHODS
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import Decisions, RouterContext
from moe_lab.routing.budget_table import knots
from moe_lab.routing.registry import make_router
from moe_lab.train.metrics import summarise
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

CONFIG = Config(
  model=ModelConfig(
    dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_experts=8,
    expert_dim=4,
    dispatch="dense",
    attention_backend="reference",  # what compiles fastest
  ),
  routing=RoutingConfig(k_max=6, warmup_steps=0, num_null_experts=8),
  data=DataConfig(vocab_size=32, seq_len=32),
  train=TrainConfig(steps=200, batch_size=8, warmup_steps=4, learning_rate=3e-3),
)
MAY_TAKE_NONE = ("relu", "expert_choice")
UNSTEERED = ("topk", "top_p", "expert_choice", "sequence_topk")  # no controller
STEPS = 100


def config_of(method, **fields):
  return dataclasses.replace(CONFIG, routing=dataclasses.replace(CONFIG.routing, method=method, **fields))


def random_batch(seed=0):
  rng = np.random.default_rng(seed)
  # Each token follows from the one before, so that experts are of use.
  tokens = ((rng.integers(0, 32, (8, 1)) + 5 * np.arange(33)) % 32).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[0, 20:] = 0
  return Batch(tokens, segments, np.zeros_like(tokens))


CASES = {method: dict(method=method) for method in METHODS} | {
  learner: dict(method="dynamic", learner=learner)
  for learner in ("leave_one_out", "none", "greedy", "ppo", "straight_through")
}
CASES |= {f"{method}, any budget": dict(method=method, budget_range=(1.5, 4.0)) for method in ("dynamic", "top_p_pi")}


# The others take as long, and are alike.
QUICK = ("random_k", "straight_through", "dynamic, any budget")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_through_the_training_step(case):
  # A frozen model's router does not learn: let it warm up first.
  config, method = config_of(**CASES[case], warmup_steps=STEPS // 2 if case == "ppo" else 0), CASES[case]["method"]
  optimizer = make_optimizer(config.train)
  step, state = (
    make_train_step(config, Transformer(config), optimizer),
    jax.jit(initial_state, static_argnums=(0, 1))(config, optimizer),
  )
  start = jax.tree.map(np.array, state.params["moe_layers"]["moe"]["router_DE"])
  realised = []
  # ReLU's coefficient starts at 1e-8 and grows by a fifth a step.
  for index in range(2 if method in UNSTEERED else 4 * STEPS if method == "relu" else STEPS):
    state, metrics = step(state, random_batch(index))
    realised.append(float((metrics.realised_Z.mean(0) / knots(config.routing)).sum() / metrics.asked.sum()))
  summary = summarise(metrics)
  assert np.isfinite(summary["loss"]) and summary["skipped"] == 0
  assert all(np.isfinite(value) for name, value in summary.items() if name.startswith("loss_"))
  assert not np.array_equal(state.params["moe_layers"]["moe"]["router_DE"], start)
  assert metrics.token_count >= 8 * 32 - 12
  if method not in UNSTEERED:
    assert np.mean(realised[-20:]) == pytest.approx(1.0, rel=0.06)  # of what was asked for


def layer(method, tokens=64, **fields):
  """A router, its parameters, hidden states and a context of one layer; the last 8 tokens are padding."""
  config = config_of(method, **fields)
  router = make_router(config.routing)
  keys = iter(jax.random.split(jax.random.key(0), 9))
  parameters = {n: std * jax.random.normal(next(keys), s) for n, (s, std) in router.parameters(config.model).items()}
  context = RouterContext(
    mask_T=jnp.arange(tokens) < tokens - 8,
    budget_T=jnp.full(tokens, 2.0),
    embedding_TD=jnp.zeros((tokens, 16)),
    state=jax.tree.map(lambda leaf: leaf[0], router.initial_state(1, 8)),
    key=None,
    decisions=Decisions(),
    budget_B=jnp.full(4, 2.0),
  )
  return router, parameters, jax.random.normal(next(keys), (tokens, 16)), context


@pytest.mark.parametrize("method", METHODS)
def test_invariants_of_a_layer(method):
  router, parameters, x_TD, context = layer(method)
  call = jax.jit(router.__call__)
  assignment, stats = call(parameters, x_TD, context)
  expert_TK, gate_TK, valid_TK = (np.asarray(x) for x in assignment[:3])
  slots = router.config.slots
  assert expert_TK.shape == gate_TK.shape == valid_TK.shape == (64, slots)
  assert all(len(set(row)) == slots for row in expert_TK)
  assert (np.diff(valid_TK.astype(int), axis=1) <= 0).all()  # valid slots first
  assert not valid_TK[-8:].any() and not gate_TK[~valid_TK].any() and (gate_TK >= 0).all()
  assert gate_TK.dtype == np.float32 and np.isfinite(gate_TK).all()
  np.testing.assert_array_equal(stats.count_T, valid_TK.sum(1))
  assert stats.token_count == 56 and stats.assigned_E.sum() == valid_TK.sum() > 0
  if method not in MAY_TAKE_NONE:
    assert stats.count_T[:-8].min() >= 1

  # What was decided can be replayed; other counts too.
  decisions = Decisions(stats.count_T, assignment.expert_TK)
  again, _ = call(parameters, x_TD, context._replace(decisions=decisions))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, assignment)
  other_T = jnp.arange(64) % 3
  again, stats = call(parameters, x_TD, context._replace(decisions=Decisions(count_T=other_T)))
  np.testing.assert_array_equal(stats.count_T, np.where(np.arange(64) < 56, other_T, 0))

  # Causal methods: a token's experts do not hang on the tokens beside it.
  changed, _ = call(parameters, x_TD.at[-12:].multiply(0.0), context)
  same = all(np.array_equal(a[:52], b[:52]) for a, b in zip(changed[:3], assignment[:3], strict=True))
  assert same == router.causal


@pytest.mark.parametrize("method", METHODS)
def test_the_gates_teach_the_router(method):
  router, parameters, x_TD, context = layer(method)

  def worth(parameters):
    assignment, _ = router(parameters, x_TD, context._replace(key=jax.random.key(1)))
    value_TK = jnp.cos(assignment.expert_TK)
    return (assignment.gate_TK * value_TK).sum()

  gradient = jax.jit(jax.grad(worth))(parameters)
  assert np.isfinite(gradient["router_DE"]).all() and jnp.abs(gradient["router_DE"]).max() > 1e-3
