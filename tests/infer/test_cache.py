"""Rings: their sizes by hand, and chunks and single tokens through them against the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import ModelConfig
from moe_lab.infer.cache import cache_bytes, empty_cache, full_cache_bytes, ring_sizes
from moe_lab.nn.transformer import Transformer, unstack_layers
from moe_lab.ops.alibi import alibi_slopes
from moe_lab.ops.ring import Ring, reference_ring_attention
from tests.infer.models import VOCAB, forward, make


def test_sizes_by_hand():
  config = ModelConfig(num_heads=4, num_kv_heads=4, num_layers=3, head_dim=8, qk_bound=0.5, num_global_groups=1)
  # Windows of 46, 319, 2210 (`windows`) and a chunk of 32: 77, 350 and 2241 slots, in multiples of 64.
  assert ring_sizes(config, 10_000, 32) == (128, 384, 2304, 10_000)
  assert ring_sizes(config, 300, 32) == (128, 300, 300, 300)
  assert [ring.k_BWMH.shape for ring in empty_cache(config, 2, 300, 32)[0]] == [(2, 128, 1, 8), (2, 300, 3, 8)]
  # Keys and values of 3 layers, 2 sequences, 8 numbers of 4 bytes.
  assert cache_bytes(config, 2, 10_000, 32) == 2 * 3 * 2 * (128 + 384 + 2304 + 10_000) * 8 * 4
  assert full_cache_bytes(config, 2, 10_000) == 2 * 3 * 2 * 4 * 10_000 * 8 * 4


@pytest.mark.parametrize("change", [dict(qk_norm=False), dict(position="rotary")])
def test_without_windows_the_cache_is_full(change):
  config = ModelConfig(**change)
  assert ring_sizes(config, 4096, 128) == (4096,) * config.num_kv_heads
  assert cache_bytes(config, 1, 4096, 128) == full_cache_bytes(config, 1, 4096)


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
@pytest.mark.parametrize("name", ["windowed", "topk_rotary_dense"])
def test_any_split_equals_the_full_pass(name, backend):
  # 620 tokens. The first ring (64 slots) wraps nine times and the second (384) once; chunks end at odd places.
  config, params, state = make(name)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_backend=backend))
  params, chunk, length = unstack_layers(params), 16, 620
  tokens = np.random.default_rng(1).integers(0, VOCAB, length).astype(np.int32)
  model = Transformer(config, unrolled=True)

  @jax.jit
  def advance(cache, token_1L, real_1L, offset):
    out = model.apply({"params": params}, token_1L, real_1L, jnp.full(1, 2.0), state, cache=cache, offset=offset)
    return out.logits_BLV[0], out.cache

  cache, done, logits = empty_cache(config.model, 1, 640, chunk), 0, []
  for count in [16, 5, 16, 1, 16, 11] + [16] * 30 + [1] * 40 + [7] + [1] * 28:
    width = 1 if count == 1 else chunk
    padded = np.full((1, width), 9, np.int32)
    padded[0, :count] = tokens[done : done + count]
    real = (np.arange(width) < count).astype(np.int32)[None]
    out, cache = advance(cache, padded, real, np.array([done]))
    logits.append(out[:count])
    done += count
  assert done == length
  np.testing.assert_allclose(np.concatenate(logits), forward(name)(tokens).logits_BLV[0], atol=1e-5)


def test_a_smaller_window_would_show():
  # The same comparison, with the steepest group's ring cut to half its window.
  slope_M, (q, k, v) = alibi_slopes(4, 1)[:1], jax.random.normal(jax.random.key(0), (3, 1, 300, 1, 4))
  # The bound reached: old keys agree with the query as far as they may, near ones disagree.
  k = jnp.where(jnp.arange(300)[None, :, None, None] < 270, q[:, -1:], -q[:, -1:]) * 0.5**0.5
  end, position = jnp.array([300]), jnp.array([[299]])
  full, right, half = (
    reference_ring_attention(q[:, -1:], Ring(k, v), jnp.asarray(slope_M), window, position, end)
    for window in (None, 46, 23)
  )
  np.testing.assert_allclose(full, right, atol=1e-6)
  assert jnp.abs(full - half).max() > 1e-5
