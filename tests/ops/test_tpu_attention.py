"""The TPU's attention kernel, interpreted on whatever machine this is, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.errors import ConfigError
from moe_lab.ops import tpu_attention
from moe_lab.ops.alibi import windows
from moe_lab.ops.attention import attention

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


CASES = {  # blocks of 16 queries of two heads, or of 32 of one
  "odd_length": dict(length=149, slopes=(0.5, 0.16)),
  "documents": dict(length=160, slopes=(0.5, 0.49), documents=4, batch=2),
  "no_global_group": dict(length=130, slopes=(0.5, 2.0, 0.49), per_group=1, width=24),  # in no order
  "all_global": dict(length=70, slopes=(0.0, 0.0), per_group=1),
  "three_heads_share_keys": dict(length=97, slopes=(0.0, 0.5), per_group=3, width=8, documents=2),
  "shorter_than_a_block": dict(length=7, slopes=(0.5, 0.0)),
  "chunk_of_a_longer_cache": dict(length=190, slopes=(0.5, 0.16, 0.0), offset=77, queries=45, documents=2),
}


def both_ways(name, window_M=None, dtype=np.float32):
  (q, k, v, slope_M, *segments), d_out = random_inputs(**CASES[name])
  offset, window_M = CASES[name].get("offset", 0), window_M or windows(slope_M, BOUND)
  got = values_and_gradients(
    (q.astype(dtype), k.astype(dtype), v.astype(dtype), slope_M, *segments), d_out.astype(dtype), offset,
    backend="tpu", window_M=window_M,
  )  # fmt: skip
  return got, values_and_gradients((q, k, v, slope_M, *segments), d_out, offset, backend="reference")


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
  for got, want in zip(*both_ways(name), strict=True):
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_bfloat16_stays_near_float32():
  # Inputs round to 2^-9 of themselves, so do weights and results: a few hundredths on numbers of order one.
  for got, want in zip(*both_ways("documents", dtype=jnp.bfloat16), strict=True):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), want, atol=0.03 * np.abs(want).max())


def test_a_window_too_small_shows():
  # A slope of 0.16 wants 134 keys; with 20, a block of 16 queries sees the 32 keys of its block and those before.
  got, want = both_ways("odd_length", window_M=(60, 20))
  for one, wanted in zip(got, want, strict=True):
    assert np.abs(one - wanted).max() > 1e-3


def test_skipped_keys_are_not_read_and_have_no_gradient():
  (q, k, v, _, segments, _), d_out = random_inputs(256, (0.5, 0.5))
  k[:, :64], v[:, :64] = np.nan, np.nan
  # Queries from 160 on look at key 96 and, in blocks of 32, at no key before 96.
  arguments = q[:, 160:200], k, v, np.float32([0.5, 0.5]), segments[:, 160:200], segments
  _, dq, dk, dv = values_and_gradients(arguments, d_out[:, 160:200], 160, backend="tpu", window_M=(65, 65))
  assert np.isfinite(dq).all()
  for x in (dk, dv):
    np.testing.assert_array_equal(x[:, :96], 0)
    assert np.abs(x[:, 96:200]).max(axis=(2, 3)).min() > 0


def test_blocks_by_hand():
  # 16 queries a block, 32 keys: queries 64..79 with a window of 5 look at keys 60..79, of blocks 1 and 2.
  plan = tpu_attention._plan(100, 100, 2)
  assert plan == (16, 32, 7, 4)
  assert [int(i) for i in plan.key_blocks(4, 0, 5)] == [1, 2]
  # Keys 32..63 are looked at by queries 32..67, of blocks 2 to 4.
  assert [int(i) for i in plan.query_blocks(1, 0, 5)] == [2, 4]
  # 20 positions in a row touch at most 2 blocks of 32, 36 at most 4 of 16.
  assert plan.steps(5) == (2, 4) and plan.steps(None) == (4, 7)


def test_steps_at_128k(monkeypatch):
  monkeypatch.undo()  # blocks as they are: of 512 keys, and of 256 queries of 4 heads
  assert tpu_attention._plan(131_072, 131_072, 4) == (256, 512, 512, 256)
  steps = [tpu_attention.steps_taken(131_072, 131_072, 4, window) for window in (53, 6000, None)]
  # 256 + 53 - 1 positions touch at most 2 blocks of 512, 256 + 6000 - 1 at most 14.
  assert steps == [512 * 2, 512 * 14, 512 * 256]


@pytest.mark.parametrize("offset, window", [(0, 1), (0, 33), (5, 16), (37, 50), (90, 2**30), (0, 2**30), (129, 64)])
def test_each_block_of_queries_is_visited_by_the_keys_that_it_visits(offset, window):
  plan = tpu_attention._plan(75, 75 + offset, 2)
  reach = window if window < 2**30 else None
  seen = set()
  for i in range(plan.num_query_blocks):
    first, last = (int(x) for x in plan.key_blocks(i, offset, window))
    assert 0 <= first <= last < plan.num_key_blocks and last - first < plan.steps(reach)[0]
    seen |= {(i, j) for j in range(first, last + 1)}
  back = set()
  for j in range(plan.num_key_blocks):
    first, last = (int(x) for x in plan.query_blocks(j, offset, window))
    assert 0 <= first and last < plan.num_query_blocks and last - first < plan.steps(reach)[1]
    back |= {(i, j) for i in range(first, last + 1)}
  assert seen == back
  # Every pair within the window is in a visited block.
  wanted = {
    (i // plan.rows, s // plan.keys)
    for i in range(75) for s in range(75 + offset) if 0 <= offset + i - s < window
  }  # fmt: skip
  assert wanted <= seen


def test_the_steepest_slope_at_the_end_of_128k():
  # A few queries there against all keys, in float64: distances are differences of integers, so nothing is lost.
  length, rows, slope = 131_072, 40, 2.0**-0.5
  (q, k, v, slope_M, *segments), _ = random_inputs(length, (slope,), per_group=1, queries=rows, offset=length - rows)
  offset, window_M = length - rows, windows(slope_M, BOUND)
  way = dict(backend="tpu", window_M=window_M)
  got = jax.jit(lambda *x: attention(*x, offset=offset, **way))(q, k, v, slope_M, *segments)
  near = slice(length - rows - 200, length)
  distance = np.arange(offset, length)[:, None] - np.arange(near.start, near.stop)
  logits = np.einsum("lh,sh->ls", q[0, :, 0], k[0, near, 0], dtype=np.float64) / 16**0.5
  weights = np.where(distance >= 0, np.exp(logits - np.float64(slope_M[0]) * distance), 0)
  np.testing.assert_allclose(got[0, :, 0], weights @ v[0, near, 0] / weights.sum(1, keepdims=True), atol=2e-6)


def test_auto_takes_the_kernel_for_tpu_alone(monkeypatch):
  monkeypatch.setattr(tpu_attention, "INTERPRET", False)
  arguments, d_out = random_inputs(256, (0.5, 0.0), width=128, per_group=1)

  def both(arguments, d_out):
    out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, *arguments[3:], window_M=(60, None)), *arguments[:3])
    return out, backward(d_out)

  traced = jax.jit(both).trace(arguments, d_out)
  # Windowed and global groups, forward, and backward for queries and for keys.
  assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 2 * 3
  assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_back_end_that_cannot_run_says_so(monkeypatch):
  monkeypatch.setattr(tpu_attention, "INTERPRET", False)
  arguments, _ = random_inputs(9, (0.5,))
  if jax.default_backend() != "tpu":
    with pytest.raises(ConfigError, match="attention_backend = 'tpu': wanted auto.*needs a TPU.*is cpu"):
      attention(*arguments, backend="tpu")
