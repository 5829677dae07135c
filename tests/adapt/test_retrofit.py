"""A policy of counts on a frozen model: nothing else moves, and with all experts it is the model that it was."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.adapt.learning import HEADS
from moe_lab.adapt.tensors import tensors
from moe_lab.config.modes import adapted, begun
from moe_lab.config.resolve import resolve
from moe_lab.config.schema import RoutingConfig
from moe_lab.errors import UserError
from moe_lab.evaluate.drift import Routed
from moe_lab.evaluate.fewer import fewer_experts
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import Decisions
from moe_lab.train.base import Base, start_from
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from tests.adapt.models import CONFIG, batches, outputs, run_steps

FIXED = dataclasses.replace(CONFIG, routing=RoutingConfig(method="topk", k=3, bias_update_rate=0.01))


def retrofitted(base=FIXED, **routing):
  """Returns configuration and state with a policy, and the base."""
  config = begun("retrofit", base, "run")
  for name, value in routing.items():
    config.routing[name] = value
  config = adapted("retrofit", base, resolve(config), Path("run"))
  state = initial_state(base, make_optimizer(base.train))
  router_state = state.router_state._replace(bias_E=0.1 * jax.random.normal(jax.random.key(4), (2, 4)))
  found = Base(Path("run"), base, state._replace(router_state=router_state), {}, 7, "print", [], {})
  return config, start_from(found, config, "print", []).state(), found


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "learner", ["curvature", *(pytest.param(one, marks=SLOW) for one in ("leave_one_out", "ppo", "value"))]
)
def test_nothing_but_the_policy_learns(learner):
  config, state, base = retrofitted(learner=learner, budget_range=(1.0, 3.0) if learner == "curvature" else ())
  after, seen = run_steps(config, state, 4)
  before, now = tensors(base.state.params), tensors(after.params)
  heads = now.keys() - before.keys()
  assert heads and all(path[-1] in HEADS for path in heads)
  for path, leaf in before.items():
    np.testing.assert_array_equal(now[path], leaf, err_msg=path[-1])
  np.testing.assert_array_equal(after.router_state.bias_E, base.state.router_state.bias_E)
  start = tensors(state.params)
  moved = {path[-1] for path in heads if np.any(np.asarray(now[path]) != np.asarray(start[path]))}
  assert "policy_out" in moved
  assert all(float(metrics.skipped) == 0 for metrics in seen)


@pytest.mark.parametrize(
  "gate", ["softmax_chosen", pytest.param("softmax_all", marks=SLOW), pytest.param("sigmoid", marks=SLOW)]
)
def test_with_all_experts_it_is_the_base(gate):
  base = dataclasses.replace(FIXED, routing=dataclasses.replace(FIXED.routing, gate=gate))
  config, state, found = retrofitted(base)
  (batch,) = batches(1, seed=9)
  everything = Decisions(count_T=jnp.full((2, batch.tokens[:, 1:].size), 3))
  inputs = batch.tokens[:, :-1], batch.segments[:, :-1], jnp.full(8, config.routing.budget), state.router_state
  got = jax.jit(Transformer(config).apply)({"params": state.params}, *inputs, decisions=everything)
  np.testing.assert_allclose(got.logits_BLV, outputs(found.state.params, found.state, base).logits_BLV, atol=1e-5)


@pytest.mark.slow
def test_the_controls_have_the_compute_of_the_policy():
  config, state, base = retrofitted()
  before, after = Routed(base.state.params, base.state.router_state), Routed(state.params, state.router_state)
  found = fewer_experts((FIXED, before), (config, after), lambda: batches(3), ("text",), [config.routing.budget])
  (policy,), (random,), (alike,) = found["policy"], found["random"], found["alike"]
  assert random["experts"] == pytest.approx(policy["experts"], abs=1e-6)
  assert alike["experts"] == pytest.approx(policy["experts"], abs=0.1)
  assert [one["experts"] for one in found["fixed"]] == [1, 2]
  assert policy["saved"] == pytest.approx(1 - policy["experts"] / 3)
  assert policy["rise"] == pytest.approx(policy["loss"] / found["full"]["loss"] - 1)


@pytest.mark.parametrize(
  ("routing", "words"),
  [
    (dict(method="topk", k=1), "--base=run: wanted a mixture of experts with routing.method = topk and routing.k of"),
    (dict(method="dynamic", k_max=4), "not dynamic"),
    (dict(method="topk", k=2, gate="softmax_unit"), "wanted gates by softmax_chosen"),
  ],
)
def test_a_base_that_does_not_go_is_a_line(routing, words):
  with pytest.raises(UserError, match=words):
    begun("retrofit", dataclasses.replace(CONFIG, routing=RoutingConfig(**routing)), "run")


def test_the_trunk_cannot_be_changed():
  with pytest.raises(UserError, match="routing.k_max = 2: wanted 3, as the base has it"):
    retrofitted(k_max=2)
  with pytest.raises(UserError, match="routing.gate = 'sigmoid'"):
    retrofitted(gate="sigmoid")


def test_default_saves_two_fifths():
  config = resolve(begun("retrofit", FIXED, "run"))
  assert config.routing.budget == pytest.approx(1.8) and config.adapt.trunk == "frozen"
  assert config.routing.gate == "softmax_kept"
