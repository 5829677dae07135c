import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops.cross_entropy import cross_entropy


def test_worked_numbers():
  # softmax(0, ln 3) = (1/4, 3/4).
  logits = jnp.asarray([[[0.0, np.log(3)], [0.0, np.log(3)], [5.0, 5.0]]])
  nll = cross_entropy(logits, jnp.asarray([[0, 1, 0]]))
  np.testing.assert_allclose(nll, [[np.log(4), np.log(4 / 3), np.log(2)]], rtol=1e-6)


def test_large_logits_and_vocabulary_shift():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 11)) * 10
  target = jax.random.randint(jax.random.key(1), (2, 3), 0, 11)
  np.testing.assert_allclose(cross_entropy(logits + 1000, target), cross_entropy(logits, target), atol=1e-3)
  assert np.isfinite(cross_entropy(logits * 1e30, target)).all()


def test_gradient_is_probability_minus_target():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
  target = jax.random.randint(jax.random.key(1), (2, 3), 0, 7)
  gradient = jax.grad(lambda x: cross_entropy(x, target).sum())(logits)
  np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - jax.nn.one_hot(target, 7), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_sum_is_taken_in_float32(dtype):
  # 1000 equal logits: ln 1000 = 6.9078, which bfloat16 could only give as 6.90625.
  nll = cross_entropy(jnp.zeros((1, 1, 1000), dtype), jnp.zeros((1, 1), jnp.int32))
  assert nll.dtype == jnp.float32
  np.testing.assert_allclose(nll, np.log(1000), rtol=1e-6)
