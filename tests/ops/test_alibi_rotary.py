"""Positions: slopes of ALiBi and rotary embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops.alibi import alibi_slopes, windows
from moe_lab.ops.rotary import rotate, stretched


@pytest.mark.parametrize(
  "kv_heads, global_groups, exponents",
  [
    (2, 1, [4]),  # a single windowed group: 8 * 0.5
    (4, 1, [4 / 3, 4, 20 / 3]),  # 8 * (0.5, 1.5, 2.5) / 3
    (4, 0, [1, 3, 5, 7]),
    (3, 3, []),
  ],
)
def test_slopes(kv_heads, global_groups, exponents):
  slopes = alibi_slopes(kv_heads, global_groups)
  assert slopes.dtype == np.float32
  np.testing.assert_allclose(slopes, [2.0**-x for x in exponents] + [0.0] * global_groups, rtol=1e-6)
  assert (np.diff(slopes) < 0).sum() == len(exponents) - (global_groups == 0)  # steepest first


def test_rotation_by_hand():
  # H = 4, base 100: frequencies 1 and 100^(-1/2) = 0.1 for the pairs (0, 2) and (1, 3).
  # At position 5 the angles are 5 and 0.5.
  x = jnp.asarray([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])[None, None]  # three heads
  out = rotate(x, jnp.asarray([5]), 100.0)[0, 0]
  want = [[np.cos(5), 0, np.sin(5), 0], [0, np.cos(0.5), 0, np.sin(0.5)], [0, -np.sin(0.5), 0, np.cos(0.5)]]
  np.testing.assert_allclose(out, want, atol=1e-6)
  np.testing.assert_array_equal(rotate(x, jnp.asarray([0]), 100.0), x)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_norms_stay(dtype, tolerance):
  x = jax.random.normal(jax.random.key(0), (2, 7, 3, 6)).astype(dtype)
  out = rotate(x, jnp.arange(7) * 1000, 10_000.0)
  assert out.dtype == dtype and out.shape == x.shape
  norm = [np.linalg.norm(np.asarray(a, np.float32), axis=-1) for a in (out, x)]
  np.testing.assert_allclose(*norm, rtol=tolerance)
  assert np.abs(np.asarray(out - x, np.float32))[:, 1:].max() > 0.5


@pytest.mark.parametrize("shift", [1, 17, 4000])
def test_products_depend_on_the_distance_alone(shift):
  q, k = (jax.random.normal(jax.random.key(seed), (1, 5, 2, 8)) for seed in (0, 1))

  def products(first):
    position = first + jnp.arange(5)
    return jnp.einsum("BLNH,BSNH->BNLS", rotate(q, position, 10_000.0), rotate(k, position, 10_000.0))

  # Angles of some thousand radians keep an error of 2^-12 or so in float32.
  np.testing.assert_allclose(products(shift), products(0), atol=1e-5 if shift < 100 else 3e-3)


@pytest.mark.parametrize("slope", [0.5, 2.0**-4, 2.0**-7.5])
def test_window(slope):
  (window,) = windows(np.array([slope]), 8.0)
  # Worst case: the near key as unlike the query as the bound lets it be, all far ones as alike, for ever on.
  far = np.exp(8.0 - slope * np.arange(window, window + round(50 / slope))).sum()
  assert 0.9e-7 * np.exp(-slope) < far / np.exp(-8.0) <= 1e-7
  assert windows(np.array([slope, 0.0]), 8.0) == (window, None) and windows(np.array([slope]), None) == (None,)


def test_stretched_frequencies_by_hand():
  # Length 64, low 1, high 4: a frequency of 2 pi / 8 makes 8 turns within it and stays; 2 pi / 128 makes half a turn
  # and is divided by 8; 2 pi / 32 makes 2, a third of the way from 1 to 4: f (1/3 + 2/3 / 8).
  frequency = 2 * np.pi / np.array([8.0, 128.0, 32.0])
  want = frequency * [1, 1 / 8, 1 / 3 + 2 / 3 / 8]
  np.testing.assert_allclose(stretched(jnp.asarray(frequency), 8.0, 1.0, 4.0, 64.0), want, rtol=1e-6)
