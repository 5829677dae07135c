"""Attention: the reference against loops, the blocked back end against the reference, and its memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops import native
from moe_lab.ops.attention import attention

LINEAR = ["blocked"] + (["native"] if native.available() else [])  # native: where there is a C++ compiler


def make_inputs(
  *, length, keys, offset=0, heads=4, kv_heads=2, slopes=(0.0, 0.25), documents=1, mixed=0, seed=0, batch=2, width=8
):
  """Random queries at offset.. of `keys` positions; each row is cut into `documents` at random places.

  With `mixed`, pieces of so many tokens are in disorder: documents come again after others.
  """
  rng = np.random.default_rng(seed)
  q, k, v = (
    jnp.asarray(rng.normal(size=(batch, n, h, width)), jnp.float32)
    for n, h in ((length, heads), (keys, kv_heads), (keys, kv_heads))
  )
  segment_BS = np.sort(rng.integers(1, documents + 1, (batch, keys)), axis=1).astype(np.int32)
  if mixed:
    segment_BS = rng.permutation(segment_BS.reshape(batch, -1, mixed), axis=1).reshape(batch, keys)
  segment_BL = segment_BS[:, offset : offset + length]
  return (q, k, v, jnp.asarray(slopes, jnp.float32), jnp.asarray(segment_BL), jnp.asarray(segment_BS))


def by_loops(q, k, v, slope_M, segment_BL, segment_BS, offset):
  """The definition, one number after the other, in float64."""
  q, k, v, slope_M = (np.asarray(a, np.float64) for a in (q, k, v, slope_M))
  batch, length, heads, width = q.shape
  per_group = heads // k.shape[2]
  out = np.zeros_like(q)
  for b, i, n in np.ndindex(batch, length, heads):
    m = n // per_group
    seen = [s for s in range(offset + i + 1) if segment_BS[b, s] == segment_BL[b, i]]
    logits = np.array([q[b, i, n] @ k[b, s, m] / width**0.5 - slope_M[m] * (offset + i - s) for s in seen])
    weights = np.exp(logits - logits.max())
    out[b, i, n] = weights / weights.sum() @ v[b, seen, m]
  return out


# Few shapes, so that few are compiled: offset, slopes and documents are no shapes.
CASES = {
  "plain": dict(length=17, keys=17, block=4),
  "documents": dict(length=17, keys=17, block=4, documents=4),
  "steep": dict(length=17, keys=17, block=4, slopes=(30.0, 3.0), documents=2),
  "block_longer_than_all": dict(length=7, keys=7, block=16),
  "one_kv_head": dict(length=9, keys=9, block=5, heads=3, kv_heads=1, slopes=(0.1,)),
  "a_kv_head_each": dict(length=8, keys=8, block=2, heads=2, kv_heads=2),
  "chunk_of_a_longer_cache": dict(length=5, keys=22, offset=11, block=4),
  "chunk_at_the_end": dict(length=5, keys=22, offset=17, block=4, documents=2),
  "one_query_at_the_end": dict(length=1, keys=17, offset=16, block=4),
  "one_query_in_the_middle": dict(length=1, keys=17, offset=6, block=4),
}


@functools.partial(jax.jit, static_argnames=("backend", "block"))
def values_and_gradients(arguments, offset, d_out, *, backend, block):
  def run(q, k, v):
    return attention(q, k, v, *arguments[3:], offset=offset, backend=backend, block=block)

  out, backward = jax.vjp(run, *arguments[:3])
  return out, backward(d_out)


def both_ways(case, *, backend, dtype=jnp.float32):
  case = dict(case)
  block, offset = case.pop("block"), case.get("offset", 0)
  q, k, v, *rest = make_inputs(**case)
  d_out = jax.random.normal(jax.random.key(1), q.shape).astype(dtype)
  arguments = (q.astype(dtype), k.astype(dtype), v.astype(dtype), *rest)
  return values_and_gradients(arguments, offset, d_out, backend=backend, block=block)


def test_worked_numbers():
  # Queries of zero leave only the slope, ln 2 a token: weights 1/4, 1/2, 1 at distances 2, 1, 0.
  #   row 0: 7;  row 1: (7 + 2 * 14) / 3 = 35/3;  row 2: (7 + 2 * 14 + 4 * 28) / 7 = 21.
  v = jnp.asarray([7.0, 14.0, 28.0]).reshape(1, 3, 1, 1)
  one_document = jnp.ones((1, 3), jnp.int32)
  slope = jnp.log(jnp.asarray([2.0]))
  out = attention(0 * v, v, v, slope, one_document, one_document, backend="reference")
  np.testing.assert_allclose(out[0, :, 0, 0], [7, 35 / 3, 21], rtol=1e-6)
  # Without a slope, logit q.k / sqrt(H): H = 4, q = (2, 0, 0, 0), k = (ln 3, 0, 0, 0) and 0: weights 3/4 and 1/4.
  q = jnp.zeros((1, 2, 1, 4)).at[0, 1, 0, 0].set(2.0)
  k = jnp.zeros((1, 2, 1, 4)).at[0, 0, 0, 0].set(jnp.log(3.0))
  v = jnp.zeros((1, 2, 1, 4)).at[0, 0, 0].set(8.0)
  out = attention(q, k, v, jnp.zeros(1), one_document[:, :2], one_document[:, :2], backend="reference")
  np.testing.assert_allclose(out[0, 1, 0], [6, 6, 6, 6], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
  case = {field: value for field, value in CASES[name].items() if field != "block"}
  out, _ = both_ways(CASES[name], backend="reference")
  np.testing.assert_allclose(out, by_loops(*make_inputs(**case), case.get("offset", 0)), atol=2e-6)


# The kernel works on 256 keys and tiles of up to 14 queries and 32 keys, and shares few heads' keys among threads.
LARGE = {
  "several_blocks": dict(length=530, keys=530, block=64, documents=5, width=32),
  "uneven_width_in_a_cache": dict(length=300, keys=600, offset=251, block=64, documents=3, width=40),
  "documents_longer_than_blocks": dict(length=900, keys=900, block=64, documents=3, width=32, slopes=(0.0, 0.01)),
  "documents_of_many_pieces": dict(length=900, keys=900, block=64, documents=40, mixed=50, width=32),
  "one_head_shared_by_threads": dict(length=800, keys=800, block=64, heads=3, kv_heads=1, slopes=(0.02,), batch=1),
}


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_linear_back_ends_equal_the_reference(name, backend):
  case = (CASES | LARGE)[name]
  (out, gradients), (want, want_gradients) = (both_ways(case, backend=b) for b in (backend, "reference"))
  np.testing.assert_allclose(out, want, atol=2e-6)
  for got, wanted in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(got, wanted, atol=5e-6)


@pytest.mark.parametrize("backend", ["reference", *LINEAR])
def test_bfloat16_stays_near_float32(backend):
  # Inputs round to 2^-9 of themselves, so do weights and results: a few hundredths on numbers of order one.
  case = CASES["documents"]
  out, gradients = both_ways(case, backend=backend, dtype=jnp.bfloat16)
  want, want_gradients = both_ways(case, backend="reference")
  assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in gradients)
  np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.04)
  for got, wanted in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", ["reference", *LINEAR])
def test_a_steep_slope_sees_only_itself(backend):
  q, k, v, _, segment_BL, segment_BS = make_inputs(length=9, keys=9)
  run = jax.jit(attention, static_argnames=("backend", "block"))
  out = run(q, k, v, jnp.full(2, 200.0), segment_BL, segment_BS, backend=backend, block=4)
  np.testing.assert_allclose(out, jnp.repeat(v, 2, axis=2), rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *LINEAR])
def test_neither_later_keys_nor_other_documents_matter(backend):
  arguments = make_inputs(length=12, keys=12, documents=3, seed=3)
  q, k, v, slope_M, segment_BL, segment_BS = arguments
  assert len(set(np.asarray(segment_BS[0]))) == 3

  @jax.jit
  def run(k, v):
    return attention(q, k, v, slope_M, segment_BL, segment_BS, backend=backend, block=5)

  before = run(k, v)
  for position in range(12):
    hidden_BL = (np.arange(12) < position) | (segment_BL != segment_BS[:, position : position + 1])
    after = run(k.at[:, position].set(9.0), v.at[:, position].set(-50.0))
    np.testing.assert_array_equal(after[hidden_BL], before[hidden_BL])
    assert np.abs(after - before).max(axis=(2, 3))[~hidden_BL].min() > 0


@pytest.mark.skipif("native" not in LINEAR, reason="no C++ compiler")
def test_the_cpu_kernel_computes_nothing_of_other_documents():
  # Zero weights would pass NaN on: only what is not computed at all leaves the other document clean. The first ends
  # with a panel of 32 keys, inside a block of 256 and a tile of 14 queries.
  q, k, v, slope_M, *_ = make_inputs(length=600, keys=600)
  segment_BS = jnp.broadcast_to(1 + (jnp.arange(600) >= 352), (2, 600)).astype(jnp.int32)
  k, v = (x.at[:, :352].set(jnp.nan) for x in (k, v))
  arguments = (q, k, v, slope_M, segment_BS, segment_BS)
  out, (dq, dk, dv) = values_and_gradients(arguments, 0, jnp.ones_like(q), backend="native", block=64)
  clean = 364  # of the tile that both documents share, the first rows are the first document's
  assert jnp.isnan(out[:, :350]).all() and jnp.isfinite(out[:, clean:]).all()
  assert jnp.isfinite(dq[:, clean:]).all() and jnp.isfinite(dk[:, 400:]).all() and jnp.isfinite(dv[:, 400:]).all()


def test_auto_is_the_reference_for_one_block_and_a_wrong_name_fails(monkeypatch):
  arguments = make_inputs(length=9, keys=9)
  monkeypatch.setattr("moe_lab.ops.attention._attend", lambda backend, *_: f"linear {backend}")
  monkeypatch.setattr("moe_lab.ops.attention.reference_attention", lambda *_: "reference")
  assert attention(*arguments, block=8) == "linear auto"
  assert attention(*arguments, block=9) == "reference"
  with pytest.raises(ValueError, match="splash.*wanted auto, reference, blocked, native, tpu or flash"):
    attention(*arguments, backend="splash")


def compiled_forward_and_backward(length, backend):
  shapes = jax.eval_shape(lambda: make_inputs(length=length, keys=length, heads=2, kv_heads=1, slopes=(0.1,), batch=1))
  return values_and_gradients.lower(shapes, 0, shapes[0], backend=backend, block=64).compile()


def largest_array(compiled):
  shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
  return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_memory_of_the_blocked_back_end_is_linear_in_length():
  short, long = (compiled_forward_and_backward(length, "blocked") for length in (512, 1024))
  assert long.memory_analysis().temp_size_in_bytes <= 2.2 * short.memory_analysis().temp_size_in_bytes
  # Nothing holds more than the queries (1024 * 2 heads * 8); the reference shows that the measurement sees 1024^2.
  assert largest_array(long) <= 1024 * 16
  assert largest_array(compiled_forward_and_backward(1024, "reference")) >= 1024 * 1024
