"""The decoder: causal, dropless, independent of neighbours; scan, remat and types change nothing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.nn.attention import QKNorm
from moe_lab.nn.block import Block, LayerInputs, SharedInputs
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import Decisions
from moe_lab.routing.registry import make_router

VOCAB, LENGTH = 40, 19
SMALL = dict(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=5, expert_dim=6, dense_dim=12)
CONFIGS = {
  "dynamic": dict(attention_block=8),
  "topk_rotary": dict(position="rotary", num_dense_layers=1, num_shared_experts=1, tie_embeddings=True),
}


def make(name="dynamic", routing=None, **model):
  # Under gates of length one an untrained threshold leaves every token one expert.
  dynamic = RoutingConfig(k_max=4, gate="softmax_all")
  routing = routing or (RoutingConfig(method="topk") if name.startswith("topk") else dynamic)
  return Config(ModelConfig(**SMALL | CONFIGS[name] | model), routing, DataConfig(vocab_size=VOCAB, seq_len=LENGTH))


def moe_layers(config):
  return config.model.num_layers - config.model.num_dense_layers


@functools.cache
def parameters(config):
  """Random, the zeros too: counts must differ from token to token for these tests to say something."""
  token = jnp.ones((1, 4), jnp.int32)
  state = make_router(config.routing).initial_state(moe_layers(config), config.model.num_experts)
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token, jnp.full(1, 2.0), state)
  rng = np.random.default_rng(0)
  # Only shapes are asked of `init`: running it would be most of these tests' time.
  return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@functools.cache
def jitted(config):
  return jax.jit(Transformer(config).apply)


def forward(config, variables, tokens, segments=None, **arguments):
  tokens = jnp.asarray(tokens, jnp.int32)
  segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
  state = make_router(config.routing).initial_state(moe_layers(config), config.model.num_experts)
  return jitted(config)(variables, tokens, segments, jnp.full(len(tokens), 2.0), state, **arguments)


def random_tokens(rows, length=LENGTH, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_is_the_same_alone_in_a_batch_and_before_other_tokens(name):
  config = make(name)
  variables, tokens = parameters(config), random_tokens(4)
  out = forward(config, variables, tokens)
  alone = forward(config, variables, tokens[2:3])
  counts = np.asarray(out.stats.count_T).reshape(-1, 4, LENGTH)
  np.testing.assert_array_equal(counts[:, 2], np.asarray(alone.stats.count_T))
  np.testing.assert_allclose(out.logits_BLV[2], alone.logits_BLV[0], atol=1e-5)
  if name == "dynamic":
    assert len(np.unique(counts)) > 1

  changed = tokens.copy()
  changed[:, 11:] = random_tokens(4, seed=1)[:, 11:]
  other = forward(config, variables, changed)
  np.testing.assert_allclose(out.logits_BLV[:, :11], other.logits_BLV[:, :11], atol=1e-5)
  assert np.abs(out.logits_BLV[:, 11:] - other.logits_BLV[:, 11:]).max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_do_not_see_each_other(name):
  config = make(name)
  variables, tokens = parameters(config), random_tokens(1)
  packed = forward(config, variables, tokens, [[1] * 7 + [2] * 9 + [0] * 3])
  first, second = forward(config, variables, tokens[:, :7]), forward(config, variables, tokens[:, 7:16])
  np.testing.assert_allclose(packed.logits_BLV[:, :7], first.logits_BLV, atol=1e-5)
  # Slopes and rotations are relative: a document's place in the row does not matter.
  np.testing.assert_allclose(packed.logits_BLV[:, 7:16], second.logits_BLV, atol=2e-5)
  assert (packed.stats.token_count == 16).all() and not packed.stats.count_T[:, 16:].any()


def test_statistics_have_the_documented_shapes():
  config = make("dynamic", num_dense_layers=1)
  out = forward(config, parameters(config), random_tokens(2), key=jax.random.key(0))
  stats, tokens, layers = out.stats, 2 * LENGTH, 2
  assert stats.assigned_E.shape == stats.prob_sum_E.shape == (layers, 5)
  assert stats.count_histogram_K1.shape == (layers, 5) and stats.z_sum.shape == stats.token_count.shape == (layers,)
  assert stats.count_T.shape == stats.policy.log_prob_T.shape == (layers, tokens)
  assert out.logits_BLV.dtype == stats.assigned_E.dtype == jnp.float32
  np.testing.assert_allclose(stats.assigned_E.sum(-1), stats.count_T.sum(-1))
  np.testing.assert_allclose(stats.prob_sum_E.sum(-1), tokens, rtol=1e-5)


def test_replayed_decisions_reproduce_a_sampled_pass():
  config = make("dynamic")
  variables, tokens = parameters(config), random_tokens(2)
  sampled = forward(config, variables, tokens, key=jax.random.key(3))
  greedy = forward(config, variables, tokens)
  assert (sampled.stats.count_T != greedy.stats.count_T).any()
  replayed = forward(config, variables, tokens, decisions=Decisions(count_T=sampled.stats.count_T))
  np.testing.assert_allclose(replayed.logits_BLV, sampled.logits_BLV, atol=1e-5)
  # Given experts are taken too: with the worst two of five instead of the best, the result is another.
  experts = jnp.broadcast_to(jnp.asarray([0, 1, 2, 3]), (3, 2 * LENGTH, 4))
  forced = forward(config, variables, tokens, decisions=Decisions(count_T=sampled.stats.count_T, expert_TK=experts))
  np.testing.assert_array_equal(forced.stats.assigned_E[:, 4], 0)
  assert np.abs(forced.logits_BLV - sampled.logits_BLV).max() > 0.1


def test_scan_equals_the_layers_one_by_one():
  config = make("dynamic")
  variables, tokens = parameters(config), jnp.asarray(random_tokens(2), jnp.int32)
  p = variables["params"]
  x = p["embedding_VD"][tokens] * config.model.dim**0.5
  shared = SharedInputs(jnp.ones_like(tokens), jnp.zeros((), jnp.int32), jnp.full(2, 2.0), x)
  state = make_router(config.routing).initial_state(3, 5)
  block = jax.jit(Block(config.model, config.routing, True).apply)
  for layer in range(3):
    one = jax.tree.map(lambda leaf: leaf[layer], (p["moe_layers"], state))  # noqa: B023
    x, _ = block({"params": one[0]}, x, LayerInputs(one[1], None, Decisions(), None), shared)
  x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["final_norm"]["gain_D"]
  np.testing.assert_allclose(x @ p["head_VD"].T, forward(config, variables, tokens).logits_BLV, atol=2e-5)


def test_no_sum_runs_along_all_tokens():
  # XLA evaluates one over constants while it compiles, and 4M tokens took it ten minutes.
  config, tokens = make(), jnp.asarray(random_tokens(3), jnp.int32)
  state = make_router(config.routing).initial_state(moe_layers(config), config.model.num_experts)
  program = jitted(config).lower(parameters(config), tokens, jnp.ones_like(tokens), jnp.full(3, 2.0), state).as_text()
  windows = re.findall(r"window_dimensions = array<i64: ([\d, ]+)>", program)
  assert not [window for window in windows if str(tokens.size) in window.split(", ")]


@functools.cache
def gradient(config):
  def loss(variables):
    return jnp.mean(jnp.square(forward(config, variables, random_tokens(2), key=jax.random.key(0)).logits_BLV))

  return jax.jit(jax.grad(loss))(parameters(make("dynamic")))


@pytest.mark.parametrize(
  "changes", [dict(remat="full"), dict(remat="dots"), dict(attention_backend="reference"), dict(dispatch="dense")]
)
def test_faster_ways_have_the_same_gradients(changes):
  got, want = gradient(make("dynamic", **changes)), gradient(make("dynamic"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max())), got, want)


def test_bfloat16_is_near_float32():
  config = make("topk_rotary", RoutingConfig(method="topk", k=5))  # all experts: rounding cannot change the choice
  variables, tokens = parameters(config), random_tokens(2)
  low = forward(
    dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16")), variables, tokens
  )
  high = forward(config, variables, tokens)
  assert low.logits_BLV.dtype == jnp.float32
  error = np.abs(low.logits_BLV - high.logits_BLV)
  assert 0 < error.mean() < 0.03 * np.abs(high.logits_BLV).mean()


def test_capacity_drops_rows_in_training_and_never_at_inference():
  config = make("topk_rotary", dispatch="capacity", capacity_factor=0.3)
  variables, tokens = parameters(config), random_tokens(2)
  assert forward(config, variables, tokens, key=jax.random.key(0)).stats.dropped_sum.sum() > 0
  out = forward(config, variables, tokens)
  assert out.stats.dropped_sum.sum() == 0
  np.testing.assert_allclose(out.logits_BLV, forward(make("topk_rotary"), variables, tokens).logits_BLV, atol=1e-5)


@pytest.mark.parametrize("width, bound", [(4, 8.0), (32, 2.0), (64, 8.0)])
def test_qk_norm_holds_its_bound(width, bound):
  norm, gains = QKNorm(bound), {"params": {"gain_H": jnp.full(width, 1e3)}}
  q, k = (norm.apply(gains, 1e3 * jax.random.normal(jax.random.key(i), (500, width))) for i in (0, 1))
  assert np.abs(q @ k.T).max() / width**0.5 <= bound * (1 + 1e-5)
  same = norm.apply(gains, jnp.ones((1, width)))
  assert float(same[0] @ same[0]) / width**0.5 == pytest.approx(bound, rel=1e-4)  # and it is reached


def test_qk_norm_over_all_heads_by_hand():
  # Two heads of width 2 with mean square (1 + 9 + 4 + 2) / 4 = 4; gains are as they come.
  gains = jnp.asarray([[1.0, 2.0], [50.0, -1.0]])
  x = jnp.asarray([[1.0, 3.0], [2.0, 2.0**0.5]])
  out = QKNorm(0.0, "N", 0.0).apply({"params": {"gain_NH": gains}}, x[None, None])[0, 0]
  np.testing.assert_allclose(out, gains * x / 2, rtol=1e-6)
