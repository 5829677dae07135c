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


@pytest.mark.parametrize(("tokens", "dim", "words"), [(1, 64, 300), (19, 130, 1000), (8, 7, 129)])
def test_logits(tokens, dim, words):
  native.register()
  x_TD, w_VD = (jax.random.normal(jax.random.key(n), (size, dim)) for n, size in enumerate((tokens, words)))
  (got_TV,) = jax.jit(lambda x, w: native.call("logits_step", [(tokens, words)], x, w))(x_TD, w_VD)
  want_TV = np.asarray(x_TD, np.float64) @ np.asarray(w_VD, np.float64).T
  np.testing.assert_allclose(got_TV, want_TV, atol=1e-4)
