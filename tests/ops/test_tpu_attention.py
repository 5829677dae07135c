"""The TPU's attention kernel, interpreted on whatever machine this is, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.errors import ConfigError
from moe_lab.ops import tpu_attention
from moe_lab.ops.alibi import windows
from moe_lab.ops.attention import attention, reference_attention
from moe_lab.ops.blocked_attention import blocks_visited

BOUND = 2.0  # S: windows of 60 keys at a slope of 0.5, of 134 at 0.16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of 32 keys and of at most 32 rows, interpreted."""
  monkeypatch.setattr(tpu_attention, "INTERPRET", True)
  monkeypatch.setattr(tpu_attention, "KEYS", 32)
  monkeypatch.setattr(tpu_attention, "ROWS", 32)


def random_inputs(length, slopes, *, per_group=2, width=16, documents=1, batch=1, queries=None, offset=0, seed=0):
  """Queries and keys of random directions, with |q.k| / sqrt(H) <= BOUND; and a gradient of the result."""
  rng = np.random.default_rng(seed)
  heads = len(slopes)
  queries = length - offset if queries is None else queries
  q, k, v, d_out = (
    rng.normal(size=(batch, rows, n, width)).astype(np.float32)
    for rows, n in ((queries, heads * per_group), (length, heads), (length, heads), (queries, heads * per_group))
  )
  q, k = (x * (BOUND * width**0.5) ** 0.5 / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  segment_BS = np.sort(rng.integers(1, documents + 1, (batch, length)), axis=1).astype(np.int32)
  return (q, k, v, np.float32(slopes), segment_BS[:, offset : offset + queries], segment_BS), d_out


@functools.partial(jax.jit, static_argnames=("backend", "window_M"))
def values_and_gradients(arguments, d_out, offset=0, **way):
  out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, *arguments[3:], offset=offset, **way), *arguments[:3])
  return out, *backward(d_out)


CASES = {
  # Blocks of 16 queries: an odd length leaves 5 of the last.
  "odd_length": dict(length=149, slopes=(0.5, 0.16)),
  "documents": dict(length=160, slopes=(0.5, 0.16), documents=4, batch=2),
  "no_global_group": dict(length=130, slopes=(2.0, 0.5, 0.49), per_group=1),
  "all_global": dict(length=70, slopes=(0.0, 0.0)),
  "global_groups_first": dict(length=190, slopes=(0.0, 0.16, 0.5, 0.0), documents=2, per_group=1),
  "a_head_each": dict(length=97, slopes=(0.5, 0.0), per_group=1, width=24),
  "three_heads_share_keys": dict(length=97, slopes=(0.5,), per_group=3, width=8),
  "shorter_than_a_block": dict(length=7, slopes=(0.5, 0.0)),
  "one_query": dict(length=90, slopes=(0.5, 0.0), offset=71, queries=1),
  "chunk_of_a_longer_cache": dict(length=190, slopes=(0.5, 0.16, 0.0), offset=77, queries=45, documents=2),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
  arguments, d_out = random_inputs(**CASES[name])
  offset = CASES[name].get("offset", 0)
  window_M = windows(arguments[3], BOUND)
  got = values_and_gradients(arguments, d_out, offset, backend="tpu", window_M=window_M)
  want = values_and_gradients(arguments, d_out, offset, backend="reference")
  for one, wanted in zip(got, want, strict=True):
    np.testing.assert_allclose(one, wanted, atol=5e-6)
