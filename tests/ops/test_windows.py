"""Keys beyond a KV group's window are skipped, and nothing changes: every back end against the full definition."""

import functools

import jax
import numpy as np
import pytest

from moe_lab.ops import native
from moe_lab.ops.alibi import windows
from moe_lab.ops.attention import attention
from moe_lab.ops.blocked_attention import blocks_visited

LINEAR = ["blocked"] + (["native"] if native.available() else [])
BOUND = 8.0
SLOPES = (2.0**-1.5, 2.0**-3.5, 2.0**-5.5, 0.0)  # windows of 95, 392, 1627 keys, and all
TOLERANCE = 1e-5


def random_inputs(length, slopes=SLOPES, *, per_group=1, width=16, documents=1, seed=0):
  """Queries and keys of random directions with the norms that QK-norm at its limit gives: |q.k| / sqrt(H) <= BOUND."""
  rng = np.random.default_rng(seed)
  heads = len(slopes)
  q, k, v, d_out = (
    rng.normal(size=(1, length, n, width)).astype(np.float32)
    for n in (heads * per_group, heads, heads, heads * per_group)
  )
  q, k = (x * (BOUND * width**0.5) ** 0.5 / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  segments = np.sort(rng.integers(1, documents + 1, (1, length)), axis=1).astype(np.int32)
  return (q, k, v, np.float32(slopes), segments, segments), d_out


def adversarial_inputs(length, slopes=SLOPES, **shape):
  """The worst that the bound allows: every query is opposed to the second half of the keys and aligned with the first.

  So a query that stands somewhat behind the middle has near keys with the logit -BOUND and far ones with BOUND.
  """
  (q, k, v, *rest), d_out = random_inputs(length, slopes, **shape)
  q = np.broadcast_to(q[:, :1, :1], q.shape)
  sign = np.where(np.arange(length) < length // 2, 1, -1)[None, :, None, None].astype(np.float32)
  return (q, q[:, :, : k.shape[2]] * sign, v, *rest), d_out


INPUTS = {"random": random_inputs, "adversarial": adversarial_inputs}
run = jax.jit(attention, static_argnames=("backend", "block", "window_M"))


def by_definition(arguments, rows=512):
  """The reference, some rows at a time: all logits at once would not fit."""
  q, k, v, slope_M, segment_BL, segment_BS = arguments
  parts = [
    run(q[:, i : i + rows], k, v, slope_M, segment_BL[:, i : i + rows], segment_BS, offset=i, backend="reference")
    for i in range(0, q.shape[1], rows)
  ]
  return np.concatenate(parts, axis=1)


def difference_by_group(arguments, want, **way):
  """The largest difference to the definition, by KV group."""
  difference = np.abs(run(*arguments, **way) - want)
  heads = len(arguments[3])
  return difference.reshape(*difference.shape[:2], heads, -1).max(axis=(0, 1, 3))


@functools.cache
def case(name, length, **shape):
  arguments, _ = INPUTS[name](length, **shape)
  return arguments, by_definition(arguments)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("name", INPUTS)
def test_skipping_changes_nothing_at_4k(name, backend):
  arguments, want = case(name, 4096)
  window_M = windows(np.array(SLOPES), BOUND)
  assert window_M == (95, 392, 1627, None)
  assert difference_by_group(arguments, want, backend=backend, window_M=window_M).max() <= TOLERANCE


@pytest.mark.parametrize("backend", LINEAR)
def test_half_the_window_does_not_do(backend):
  arguments, want = case("adversarial", 4096)
  halves = tuple(window and window // 2 for window in windows(np.array(SLOPES), BOUND))
  difference_M = difference_by_group(arguments, want, backend=backend, window_M=halves)
  assert (difference_M[:3] > 10 * TOLERANCE).all() and difference_M[3] <= TOLERANCE


def test_blocks_skipped_by_hand():
  # Four blocks of 4 queries see 1 + 2 + 3 + 4 = 10 blocks of keys. With a window of 5, the block of queries at 8 looks
  # back to key 4, hence at 2 blocks; with one of 6 to key 3, hence at 3.
  assert blocks_visited(16, 16, None, block=4) == 10
  assert blocks_visited(16, 16, 5, block=4) == 1 + 2 + 2 + 2
  assert blocks_visited(16, 16, 6, block=4) == 1 + 2 + 3 + 3
  assert blocks_visited(1, 16, 5, block=4, offset=12) == 2  # key 8 to key 12
  visited = [blocks_visited(4096, 4096, window) for window in (*windows(np.array(SLOPES), BOUND), 10**6)]
  assert visited == sorted(visited) and visited[2] < visited[3] == visited[4] == 64 * 65 // 2


SHAPES = {
  "odd_length": dict(length=997, slopes=(0.5, 0.11), per_group=1, width=24),
  "grouped_queries": dict(length=640, slopes=(0.0, 0.11, 0.5, 0.49, 0.11), per_group=3, width=8),  # in no order
  "documents": dict(length=800, slopes=(0.5, 0.11, 0.0), per_group=2, width=40, documents=3),
}


@functools.partial(jax.jit, static_argnames=("backend", "window_M", "block"))
def values_and_gradients(arguments, d_out, **way):
  out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, *arguments[3:], **way), *arguments[:3])
  return out, *backward(d_out)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_values_and_gradients(name, shape, backend):
  arguments, d_out = INPUTS[name](**SHAPES[shape])
  window_M = windows(arguments[3], BOUND)
  assert min(w for w in window_M if w) < 100
  want = values_and_gradients(arguments, d_out, backend="reference")
  got = values_and_gradients(arguments, d_out, backend=backend, window_M=window_M, block=32)
  for one, wanted in zip(got, want, strict=True):
    np.testing.assert_allclose(one, wanted, atol=TOLERANCE * max(1, np.abs(wanted).max()))
  if name == "adversarial":
    halves = tuple(window and window // 2 for window in window_M)
    wrong = values_and_gradients(arguments, d_out, backend=backend, window_M=halves, block=32)
    for one, wanted in zip(wrong, want, strict=True):
      assert np.abs(one - wanted).max() > 10 * TOLERANCE


@pytest.mark.parametrize("backend", LINEAR)
def test_skipped_keys_are_not_read_and_have_no_gradient(backend):
  (q, k, v, _, segments, _), d_out = random_inputs(1024, (0.5, 0.5), per_group=2)
  window = 67  # queries from 800 on look at key 734, and at no block or panel before 672
  k, v = (x.copy() for x in (k, v))
  k[:, :672], v[:, :672] = np.nan, np.nan

  arguments = q[:, 800:900], k, v, np.float32([0.5, 0.5]), segments[:, 800:900], segments
  way = dict(backend=backend, block=32, offset=800)
  _, dq, dk, dv = values_and_gradients(arguments, d_out[:, 800:900], window_M=(window, window), **way)
  assert all(np.isfinite(x).all() for x in (dq, dk, dv))
  for x in (dk, dv):
    np.testing.assert_array_equal(x[:, :672], 0)
    assert np.abs(x[:, 734:900]).max(axis=(2, 3)).min() > 0
  # Without a window everything is read.
  assert np.isnan(values_and_gradients(arguments, d_out[:, 800:900], **way)[0]).all()


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("offset", [0, 700, 941])
def test_a_chunk_of_a_longer_cache(offset, backend):
  (q, k, v, slope_M, segments, _), _ = adversarial_inputs(1111, (0.5, 0.11, 0.0), per_group=2)
  chunk = q[:, offset : offset + 170], k, v, slope_M, segments[:, offset : offset + 170], segments
  got, want = (
    run(*chunk, offset=offset, **way)
    for way in (dict(backend=backend, window_M=windows(slope_M, BOUND)), dict(backend="reference"))
  )
  np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("backend", LINEAR)
def test_the_steepest_slope_at_the_end_of_128k(backend):
  # A few queries there against all keys, in float64: distances are differences of integers, so nothing is lost.
  length, rows, slope = 131_072, 96, 2.0**-0.5
  (q, k, v, *_), _ = random_inputs(length, (slope,), width=8)
  q, ones = q[:, -rows:], np.ones((1, length), np.int32)
  window_M = windows(np.array([slope]), BOUND)
  way = dict(offset=length - rows, backend=backend, window_M=window_M)
  got = run(q, k, v, np.float32([slope]), ones[:, -rows:], ones, **way)
  near = slice(length - rows - 200, length)
  distance = np.arange(length - rows, length)[:, None] - np.arange(near.start, near.stop)
  logits = np.einsum("lh,sh->ls", q[0, :, 0], k[0, near, 0], dtype=np.float64) / 8**0.5
  weights = np.where(distance >= 0, np.exp(logits - np.float64(np.float32(slope)) * distance), 0)
  want = weights @ v[0, near, 0] / weights.sum(1, keepdims=True)
  np.testing.assert_allclose(got[0, :, 0], want, atol=TOLERANCE / 5)
