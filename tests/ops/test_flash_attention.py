"""A stock flash kernel with positions as a feature of keys: its mathematics by XLA anywhere, the kernel on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.errors import ConfigError
from moe_lab.ops.alibi import windows
from moe_lab.ops.attention import attention
from moe_lab.ops.flash_attention import chunk_of, flash_attention

BOUND = 2.0
SLOPES = (0.0, 0.5, 0.11, 0.49)  # chunks of 128 keys, and of 256


def random_inputs(length, slopes=SLOPES, *, per_group=2, width=16, dtype=np.float32):
  rng = np.random.default_rng(0)
  heads = len(slopes)
  q, k, v, d_out = (
    rng.normal(size=(2, length, n, width)).astype(np.float32)
    for n in (heads * per_group, heads, heads, heads * per_group)
  )
  q, k = (x * (BOUND * width**0.5) ** 0.5 / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  return *(x.astype(dtype) for x in (q, k, v)), np.float32(slopes), np.ones((2, length), np.int32), d_out.astype(dtype)


@functools.partial(jax.jit, static_argnames="backend")
def values_and_gradients(q, k, v, slope_M, segment_BL, d_out, backend):
  def run(q, k, v):
    if backend == "xla":
      window_M = windows(np.float32(SLOPES), BOUND)
      return flash_attention(q, k, v, slope_M, segment_BL, window_M=window_M, implementation="xla")
    return attention(q, k, v, slope_M, segment_BL, segment_BL, backend=backend)

  out, backward = jax.vjp(run, q, k, v)
  return out, *backward(d_out)


@pytest.mark.parametrize("length", [50, 517, 1100])  # only the last is long enough for chunks
def test_values_and_gradients(length):
  assert [chunk_of(w) for w in windows(np.float32(SLOPES), BOUND)[1:]] == [128, 256, 128]
  arguments = random_inputs(length)
  got, want = (values_and_gradients(*arguments, backend=backend) for backend in ("xla", "reference"))
  for one, wanted in zip(got, want, strict=True):
    np.testing.assert_allclose(one, wanted, atol=1e-5 if length < 1024 else 2e-5)


@pytest.mark.parametrize("length", [50, 1100])
def test_documents(length):
  # One of a single token, one that a chunk begins in, and padding; the other row is one document.
  q, k, v, slope_M, segment_BL, d_out = random_inputs(length)
  for first, document in ((length // 3, 2), (length // 3 + 1, 3), (length // 2, 7), (length - 5, 0)):
    segment_BL[0, first:] = document
  got, want = (values_and_gradients(q, k, v, slope_M, segment_BL, d_out, backend) for backend in ("xla", "reference"))
  for one, wanted in zip(got, want, strict=True):
    np.testing.assert_allclose(one, wanted, atol=1e-4)  # float32 beside seven documents' logits


def test_a_slope_without_a_window():
  slope_M = np.float32([0.1, *SLOPES[1:]])
  arguments = random_inputs(200, slopes=slope_M)
  got, want = (values_and_gradients(*arguments, backend=backend) for backend in ("xla", "reference"))
  for one, wanted in zip(got, want, strict=True):
    np.testing.assert_allclose(one, wanted, atol=1e-5)


def test_bfloat16_stays_near_float32():
  got = values_and_gradients(*random_inputs(300, dtype=jnp.bfloat16), backend="xla")
  for one, wanted in zip(got, values_and_gradients(*random_inputs(300), backend="reference"), strict=True):
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(one.astype(np.float32), wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_slope_is_exact_at_the_end_of_128k(dtype):
  # Queries and keys of zero leave the slope alone: rows are geometric means of the values before them. The values are
  # small integers, exact in bfloat16 too, where results round to 2^-9, and since jax 0.12 the weights before them.
  length, slope = 131_072, np.float32(2.0**-0.5)
  zeros = np.zeros((1, length, 1, 8), dtype)
  v = (np.arange(length)[::-1] % 8).astype(dtype)[None, :, None, None] + zeros
  window_M = windows(np.array([slope]), 8.0)
  run = jax.jit(lambda q, k, v, s: flash_attention(q, k, v, slope[None], s, window_M=window_M, implementation="xla"))
  got = np.float64(run(zeros, zeros, v, np.ones((1, length), np.int32))[0, :, 0, 0])
  weights = np.exp(-np.float64(slope) * np.arange(100))
  for row in (131_071, 131_070, 131_000, 130_999, 65_536, 128):
    values = np.float64(v[0, row - 99 : row + 1, 0, 0])[::-1]
    want = weights @ values / weights.sum()
    assert abs(got[row] - want) <= (1e-5 if dtype == np.float32 else 2**-7 * want), row


def test_documents_out_of_order_are_nan():
  q, k, v, slope_M, segment_BL, d_out = random_inputs(50)
  segment_BL[0, 30:] = 2
  segment_BL[0, 40:] = 1
  out, *_ = values_and_gradients(q, k, v, slope_M, segment_BL, d_out, backend="xla")
  assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_without_a_gpu_it_says_so():
  if jax.default_backend() != "gpu":
    with pytest.raises(ConfigError, match="attention_backend = 'flash': wanted auto.*needs a GPU.*is cpu"):
      values_and_gradients(*random_inputs(50), backend="flash")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("length", [517, 1100])
def test_the_kernel_on_a_gpu(length):
  q, k, v, slope_M, segment_BL, d_out = random_inputs(length, width=64, dtype=jnp.bfloat16)
  segment_BL[0, length // 2 :], segment_BL[0, -5:] = 2, 0

  def run(q, k, v):
    window_M = windows(np.float32(SLOPES), BOUND)
    return attention(q, k, v, slope_M, segment_BL, segment_BL, backend="flash", window_M=window_M)

  out, backward = jax.jit(lambda *x: jax.vjp(run, *x))(q, k, v)
  inputs = random_inputs(length, width=64)
  want = values_and_gradients(*inputs[:4], segment_BL, inputs[5], backend="reference")
  for one, wanted in zip((out, *backward(d_out)), want, strict=True):
    np.testing.assert_allclose(one.astype(np.float32), wanted, atol=0.03 * np.abs(wanted).max())
