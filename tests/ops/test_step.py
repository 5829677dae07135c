"""The CPU kernels of a decoding step against their definitions, at sizes that reach their vector and parallel paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops import native
from moe_lab.ops.ring import Ring, reference_ring_attention, ring_attention

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


@pytest.mark.parametrize(
  ("batch", "heads", "groups", "width", "slots", "window"),
  [(1, 4, 2, 64, 64, None), (3, 6, 3, 17, 96, 60), (8, 8, 2, 40, 640, 512), (2, 16, 8, 128, 1024, None)],
)
def test_attention_over_rings(batch, heads, groups, width, slots, window):
  keys = jax.random.split(jax.random.key(0), 3)
  q_B1NH = jax.random.normal(keys[0], (batch, 1, heads, width))
  ring = Ring(*(jax.random.normal(key, (batch, slots, groups, width)) for key in keys[1:]))
  slope_M = jnp.linspace(0.3, 0.0 if window is None else 0.01, groups)
  # The first has one key; those of a windowed ring have gone round it, the others are full or not.
  end_B = jnp.asarray([1, slots, slots - 5, 7][:batch] + [slots - 3] * (batch - 4), jnp.int32)
  if window is not None:
    end_B = end_B.at[1:].add(slots + 11)
  arguments = (slope_M, window, end_B[:, None] - 1, end_B)
  got = jax.jit(lambda q, ring: ring_attention(q, ring, None, *arguments, backend="native"))(q_B1NH, ring)
  np.testing.assert_allclose(got, reference_ring_attention(q_B1NH, ring, *arguments), atol=2e-6)


@pytest.mark.parametrize(
  ("shape", "window", "ends"),
  [
    ((5, 257, 1, 3, 21), 257, [258, 5, 0, 514, 77]),  # an odd ring, all of it in the window; a row that holds nothing
    ((9, 128, 4, 1, 130), 40, [0, 1, 40, 41, 127, 128, 129, 5000, 39]),  # on both sides of the window and of the ring
  ],
)
def test_attention_at_the_ends_of_rings(shape, window, ends):
  (batch, slots, groups, per_group, width), keys = shape, jax.random.split(jax.random.key(0), 3)
  ring = Ring(*(jax.random.normal(key, (batch, slots, groups, width)) for key in keys[:2]))
  q_B1NH = jax.random.normal(keys[2], (batch, 1, groups * per_group, width))
  slope_M, end_B = 2.0 ** -jnp.arange(2.0, 2 + groups), jnp.asarray(ends, jnp.int32)
  arguments = (slope_M, window, end_B[:, None] - 1, end_B)
  got = ring_attention(q_B1NH, ring, None, *arguments, backend="native")
  written = np.asarray(ends) > 0
  want = reference_ring_attention(q_B1NH, ring, *arguments)
  np.testing.assert_allclose(got[written], want[written], atol=2e-6)
  np.testing.assert_array_equal(got[~written], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_auto_copies_no_ring_into_another_type(dtype):
  q_B1NH, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 2, 8)).astype(dtype)
  end_B = jnp.asarray([3, 70])

  def attend(q_B1NH, *ring):
    return ring_attention(q_B1NH, Ring(*ring), None, jnp.ones(2), 60, end_B[:, None] - 1, end_B)

  called = "attention_step" in str(jax.make_jaxpr(attend)(q_B1NH[:, :1], k, v))
  assert called == (dtype == jnp.float32 and native.used_here())


@pytest.mark.parametrize(("tokens", "dim", "words"), [(1, 64, 300), (19, 130, 1000), (8, 7, 129)])
def test_logits(tokens, dim, words):
  native.register()
  x_TD, w_VD = (jax.random.normal(jax.random.key(n), (size, dim)) for n, size in enumerate((tokens, words)))
  (got_TV,) = jax.jit(lambda x, w: native.call("logits_step", [(tokens, words)], x, w))(x_TD, w_VD)
  want_TV = np.asarray(x_TD, np.float64) @ np.asarray(w_VD, np.float64).T
  np.testing.assert_allclose(got_TV, want_TV, atol=1e-4)
