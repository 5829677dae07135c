"""The analytical FLOPs against the compiler's own count of one layer without loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.nn.block import Block, LayerInputs, SharedInputs
from moe_lab.nn.transformer import head
from moe_lab.routing.base import Decisions, initial_router_state

BATCH, LENGTH = 2, 128
MODEL = ModelConfig(
  dim=128,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  num_experts=8,
  expert_dim=192,
  # The definitions: the compiler counts one trip of a loop, and nothing of a library call.
  attention_backend="reference",
  dispatch="capacity",
  capacity_factor=1.0,
)
ROUTINGS = {
  "topk": RoutingConfig(method="topk", k=2),
  "dynamic": RoutingConfig(method="dynamic", budget=3.0, k_max=4, learner="value"),
}


def compiled_flops(f, *arguments) -> float:
  return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]


def layer(config: Config):
  """Returns the layer's function of (params, x_BLD), and both."""
  block = Block(config.model, config.routing, True)
  x_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, config.model.dim))
  segment_BL = jnp.ones((BATCH, LENGTH), jnp.int32)
  state = jax.tree.map(lambda leaf: leaf[0], initial_router_state(1, config.model.num_experts))
  inputs = LayerInputs(state, jax.random.key(1), Decisions(), None)
  shared = SharedInputs(segment_BL, jnp.int32(0), jnp.full(BATCH, config.routing.budget), x_BLD)
  params = block.init(jax.random.key(2), x_BLD, inputs, shared)
  return lambda params, x_BLD: block.apply(params, x_BLD, inputs, shared), params, x_BLD


@pytest.mark.parametrize("shared", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("name", ROUTINGS)
def test_within_a_tenth_of_the_compilers_count(name, shared):
  model = dataclasses.replace(MODEL, num_shared_experts=shared)
  config = Config(model, ROUTINGS[name], DataConfig(vocab_size=512))
  mean = config.routing.k if name == "topk" else config.routing.budget
  tokens = BATCH * LENGTH
  # What is executed: capacity's rows, full or not, and all keys of the definition of attention.
  rows = math.ceil(tokens * mean / model.num_experts) * model.num_experts / tokens
  want = forward_flops_per_token(config, rows, LENGTH)
  run, params, x_BLD = layer(config)

  forward = compiled_flops(lambda p, x: run(p, x)[0], params, x_BLD) / tokens
  assert forward == pytest.approx(want["total"] - want["head"], rel=0.1)

  # Backward is two products for each of forward's; the decisions have none, and teach nothing here.
  both = compiled_flops(jax.grad(lambda p, x: jnp.square(run(p, x)[0]).sum(), (0, 1)), params, x_BLD) / tokens
  assert both == pytest.approx(3 * (want["total"] - want["head"]), rel=0.1)


def test_the_head():
  config = Config(MODEL, ROUTINGS["topk"], DataConfig(vocab_size=512))
  hidden, weights = jnp.ones((BATCH, LENGTH, MODEL.dim)), jnp.ones((512, MODEL.dim))
  got = compiled_flops(head, hidden, weights) / (BATCH * LENGTH)
  assert got == pytest.approx(forward_flops_per_token(config, 2, LENGTH)["head"], rel=0.01)
