"""Filters by hand, shares of many draws, and draws that know nothing of their neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.infer.sampling import Sampling, kept, sample

LOGITS = jnp.log(jnp.asarray([0.1, 0.5, 0.15, 0.25]))


@pytest.mark.parametrize(
  ("top_k", "top_p", "min_p", "want"),
  [
    (0, 1.0, 0.0, [1, 1, 1, 1]),
    (1, 1.0, 0.0, [0, 1, 0, 0]),
    (3, 1.0, 0.0, [0, 1, 1, 1]),
    (9, 1.0, 0.0, [1, 1, 1, 1]),
    (0, 0.6, 0.0, [0, 1, 0, 1]),  # 0.5 does not reach 0.6, 0.5 + 0.25 does
    (0, 0.0, 0.0, [0, 1, 0, 0]),
    (2, 0.7, 0.0, [0, 1, 0, 1]),  # of the two, 0.5 is two thirds
    (2, 0.6, 0.0, [0, 1, 0, 0]),
    (0, 1.0, 0.4, [0, 1, 0, 1]),  # at least 0.4 * 0.5
    (0, 1.0, 1.0, [0, 1, 0, 0]),
  ],
)
def test_filters_by_hand(top_k, top_p, min_p, want):
  got = kept(jax.nn.softmax(LOGITS), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
  np.testing.assert_array_equal(got, np.array(want, bool))


def test_filters_equal_sorting():
  probability_V = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (500,)))
  sorted_V = jnp.sort(probability_V, descending=True)
  for top_k, top_p in ((0, 0.9), (40, 1.0), (40, 0.5), (0, 0.999)):
    among_V = sorted_V[: top_k or 500]
    last = among_V[jnp.searchsorted(jnp.cumsum(among_V), top_p * among_V.sum() * (1 - 1e-6))]
    got = kept(probability_V, jnp.int32(top_k), jnp.float32(top_p), jnp.float32(0.0))
    np.testing.assert_array_equal(got, probability_V >= last)


@pytest.mark.parametrize(
  ("temperature", "top_p", "want"),
  [
    (0.0, 1.0, [0, 1, 0, 0]),
    (1.0, 1.0, [0.1, 0.5, 0.15, 0.25]),
    (1.0, 0.6, [0, 2 / 3, 0, 1 / 3]),
    # Temperature 1/2 squares the odds: 1 : 25 : 2.25 : 6.25, sum 34.5.
    (0.5, 1.0, np.array([1, 25, 2.25, 6.25]) / 34.5),
  ],
)
def test_shares_of_many_draws(temperature, top_p, want):
  num = 4000
  sampling = Sampling(
    jnp.full(num, temperature), jnp.zeros(num, jnp.int32), jnp.full(num, top_p), jnp.zeros(num), jnp.arange(num)
  )
  token_B, log_prob_B = sample(jnp.broadcast_to(LOGITS, (num, 4)), jnp.zeros(num, jnp.int32), sampling)
  np.testing.assert_allclose(np.bincount(token_B, minlength=4) / num, want, atol=0.03)
  np.testing.assert_allclose(log_prob_B, LOGITS[token_B], atol=1e-6)


def test_a_draw_depends_on_its_own_seed_and_number_only():
  def draw(rows):
    seed, index = (jnp.asarray([row[i] for row in rows], jnp.int32) for i in (0, 1))
    num, ones = len(rows), jnp.ones(len(rows))
    logits_BV = jnp.broadcast_to(jnp.linspace(0, 1, 200), (num, 200))
    return sample(logits_BV, index, Sampling(ones, jnp.zeros(num, jnp.int32), ones, 0 * ones, seed))[0].tolist()

  a, b, c = draw([(7, 0), (7, 1), (8, 0)])
  assert len({a, b, c}) == 3
  assert draw([(8, 0), (3, 3), (7, 1)])[::2] == [c, b] and draw([(7, 0)]) == [a]
