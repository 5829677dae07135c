import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops.cross_entropy import cross_entropy, head_losses, weighted_head_loss


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


def random_head(dtype, tokens=13, dim=5, vocab=11):
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (tokens, dim)).astype(dtype),
    jax.random.normal(keys[1], (vocab, dim)),
    jax.random.randint(keys[2], (tokens,), 0, vocab),
    jax.random.uniform(keys[3], (tokens,)) * (jnp.arange(tokens) != 4),  # one token does not count
  )


def by_all_logits(x_TD, head_VD, target_T, weight_T):
  nll_T = cross_entropy(x_TD.astype(jnp.float32) @ head_VD.astype(x_TD.dtype).astype(jnp.float32).T, target_T)
  return jnp.sum(nll_T * weight_T), nll_T


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_chunks_equal_the_definition(dtype, tolerance, chunk):
  case = random_head(dtype)

  def run(loss):
    # The factor stands for everything that the loss is scaled by after the sum.
    value_and_grad = jax.value_and_grad(lambda *a: (lambda total, nll: (-3 * total, nll))(*loss(*a)), (0, 1), True)
    return jax.jit(value_and_grad)(*case)

  (got, nll_T), gradients = run(lambda *a: weighted_head_loss(*a, chunk))
  (want, want_nll_T), want_gradients = run(by_all_logits)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(nll_T, want_nll_T, atol=1e-5)
  np.testing.assert_allclose(head_losses(*case[:3], chunk), want_nll_T, atol=1e-5)
  for gradient, wanted in zip(gradients, want_gradients, strict=True):
    assert gradient.dtype == wanted.dtype
    scale = np.abs(wanted.astype(jnp.float32)).max()
    np.testing.assert_allclose(gradient.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance * scale)
  assert not np.any(gradients[0][4]) and np.any(gradients[0][5])


def test_no_array_holds_all_logits():
  tokens, vocab, chunk = 96, 50, 8
  case = random_head(jnp.float32, tokens, 3, vocab)
  step = jax.jit(jax.grad(lambda *a: weighted_head_loss(*a, chunk)[0], (0, 1)))
  text = step.lower(*case).compile().as_text()
  assert f"[{chunk},{vocab}]" in text and f"[{tokens},{vocab}]" not in text and f"[12,{chunk},{vocab}]" not in text
