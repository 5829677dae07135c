"""Generation computes what the training forward pass does, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.infer.cache import empty_cache
from moe_lab.infer.generate import Generator
from moe_lab.infer.sampling import sample
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.registry import make_router

VOCAB = 40
CONFIGS = {
  "dynamic_alibi": (dict(), RoutingConfig(k_max=4)),
  "topk_rotary_dense": (dict(position="rotary", num_dense_layers=1), RoutingConfig(method="topk")),
}


@functools.cache
def make(name):
  model, routing = CONFIGS[name]
  small = dict(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=5, expert_dim=6)
  config = Config(ModelConfig(**small | model), routing, DataConfig(vocab_size=VOCAB))
  state = make_router(config.routing).initial_state(config.model.num_layers - config.model.num_dense_layers, 5)
  token = jnp.ones((1, 4), jnp.int32)
  # Only shapes are asked of `init`: running it would be most of these tests' time.
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token, jnp.full(1, 2.0), state)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)["params"]
  return config, params, state


@functools.cache
def generators(name):
  return Generator(*make(name))


@pytest.mark.parametrize("prompt_length", [1, 13, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_the_full_forward_pass(name, prompt_length):
  config, params, state = make(name)
  generator = generators(name)
  prompt = np.random.default_rng(0).integers(0, VOCAB, prompt_length).astype(np.int32)
  steps = list(generator.generate(prompt, 12, temperature=0.0))
  tokens = np.concatenate([prompt, [s.token for s in steps]])[None].astype(np.int32)
  out = jax.jit(Transformer(config).apply)({"params": params}, tokens, np.ones_like(tokens), jnp.full(1, 2.0), state)
  after = out.logits_BLV[0, prompt_length - 1 : -1]
  np.testing.assert_array_equal(after.argmax(-1), [s.token for s in steps])
  want = jax.nn.log_softmax(after)[np.arange(12), tokens[0, prompt_length:]]
  np.testing.assert_allclose([s.log_prob for s in steps], want, atol=1e-4)
  np.testing.assert_allclose([s.experts for s in steps], out.stats.count_T.mean(0)[prompt_length - 1 : -1], rtol=1e-6)

  logits_V, *_ = generator.prefill(prompt, 128, 2.0)
  np.testing.assert_allclose(logits_V, after[0], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_may_come_in_chunks(name):
  # 7 tokens, then 7 more from position 7 on, which see the first through the cache; blocks of 4 divide neither.
  config, params, state = make(name)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_block=4))
  tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 14)).astype(np.int32)
  forward = jax.jit(Transformer(config).apply)

  def logits(tokens, **arguments):
    out = forward({"params": params}, tokens, np.ones_like(tokens), jnp.full(2, 2.0), state, **arguments)
    return out.logits_BLV, out.cache

  whole, _ = logits(tokens)
  first, cache = logits(tokens[:, :7], cache=empty_cache(config.model, 2, 18), offset=0)
  second, _ = logits(tokens[:, 7:], cache=cache, offset=7)
  np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-4)


def test_a_seed_fixes_the_text_and_stop_ends_it():
  generator = generators("dynamic_alibi")
  prompt = np.array([1, 2, 3], np.int32)

  def text(**arguments):
    return [s.token for s in generator.generate(prompt, 20, temperature=1.0, **arguments)]

  first = text(seed=1)
  assert first == text(seed=1) != text(seed=2)
  stop = first[4]
  assert text(seed=1, stop=stop) == first[: first.index(stop) + 1]


def test_sampling():
  logits = jnp.log(jnp.asarray([0.1, 0.5, 0.15, 0.25]))
  keys = jax.random.split(jax.random.key(0), 4000)

  def shares(temperature, top_p):
    tokens = jax.vmap(lambda key: sample(key, logits, temperature, top_p))(keys)
    return np.bincount(tokens, minlength=4) / 4000

  np.testing.assert_array_equal(shares(0.0, 1.0), [0, 1, 0, 0])
  np.testing.assert_allclose(shares(1.0, 1.0), [0.1, 0.5, 0.15, 0.25], atol=0.03)
  # 0.5 does not reach 0.6, 0.5 + 0.25 does: two tokens stay, 2 : 1.
  np.testing.assert_allclose(shares(1.0, 0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
  np.testing.assert_array_equal(shares(1.0, 0.0), [0, 1, 0, 0])
  # Temperature 1/2 squares the odds: 1 : 25 : 2.25 : 6.25, sum 34.5.
  np.testing.assert_allclose(shares(0.5, 1.0), np.array([1, 25, 2.25, 6.25]) / 34.5, atol=0.03)
