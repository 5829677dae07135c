"""Small models with random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.registry import make_router

VOCAB = 40
SMALL = dict(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=5, expert_dim=6)
CONFIGS = {
  # Windows of 46, 319, 2210 and all.
  "windowed": (dict(num_kv_heads=4, num_heads=8, qk_bound=0.5), RoutingConfig(k_max=4, learner="value")),
  # Windows of 120, 833, 5755 and all.
  "windowed_interpolated": (
    dict(num_kv_heads=4, num_heads=8, qk_bound=0.5, position_interpolation=2.5, sharpen_from=20),
    RoutingConfig(method="topk"),
  ),
  "topk_rotary_dense": (
    dict(position="rotary", num_dense_layers=1, position_interpolation=3.0),
    RoutingConfig(method="topk"),
  ),
}


@functools.cache
def make(name):
  """Returns config, params, router_state."""
  model, routing = CONFIGS[name]
  config = Config(ModelConfig(**SMALL | model), routing, DataConfig(vocab_size=VOCAB))
  num_moe = config.model.num_layers - config.model.num_dense_layers
  state = make_router(config.routing).initial_state(num_moe, config.model.num_experts)
  token = jnp.ones((1, 4), jnp.int32)
  # Only shapes are asked of `init`: running it would be most of these tests' time.
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token, jnp.full(1, 2.0), state)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)["params"]
  return config, params, state


@functools.cache
def forward(name):
  """Returns the compiled full forward pass of tokens [n]: its `Output`."""
  config, params, state = make(name)
  apply = jax.jit(Transformer(config).apply)

  def run(tokens, budget=2.0):
    tokens = np.asarray(tokens, np.int32)[None]
    return apply({"params": params}, tokens, np.ones_like(tokens), jnp.full(1, budget), state)

  return run
