"""Random counts: their distribution in training and at inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import RoutingConfig
from moe_lab.errors import ConfigError
from moe_lab.routing.count_policy import budget_log_prior
from moe_lab.routing.random_k import RandomK, hash_uniform

TOKENS = 8000


def shares(make_context, key, **fields):
  router = RandomK(RoutingConfig(method="random_k", k_max=4, standardise=False, **fields))
  x_TD = jax.random.normal(jax.random.key(5), (TOKENS, 8))
  _, stats = router({"router_DE": jnp.zeros((8, 6))}, x_TD, make_context(TOKENS, 6, key=key))
  return np.asarray(stats.count_histogram_K1) / TOKENS


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["inference", "training"])
def test_counts_are_distributed_as_asked(make_context, key):
  # A share's standard error is at most 0.5 / sqrt(8000) = 0.0056.
  prior = np.exp(budget_log_prior(jnp.asarray([2.0]), 1, 4))[0]
  np.testing.assert_allclose(shares(make_context, key), [0, *prior], atol=0.02)
  given = shares(make_context, key, count_shares=(0.5, 0.25, 0.0, 0.25), budget=2.0)
  np.testing.assert_allclose(given, [0, 0.5, 0.25, 0, 0.25], atol=0.02)
  assert given[3] == 0


def test_the_hash_is_uniform_and_a_tokens_own():
  x_TD = jax.random.normal(jax.random.key(1), (4096, 16))
  uniform_T = hash_uniform(x_TD)
  counts = np.histogram(uniform_T, bins=16, range=(0, 1))[0]  # 256 each, standard deviation 15.5
  assert np.abs(counts - 256).max() < 70
  np.testing.assert_array_equal(hash_uniform(x_TD[7:9]), uniform_T[7:9])
  assert np.abs(np.corrcoef(uniform_T[1:], uniform_T[:-1])[0, 1]) < 0.06


@pytest.mark.parametrize(
  "fields, line",
  [
    (dict(method="topk", count_shares=(1.0,)), "count_shares.*random_k"),
    (dict(method="random_k", k_max=2, count_shares=(0.5, 0.25, 0.25)), "one share for each count from k_min = 1 to"),
    (dict(method="random_k", k_max=2, count_shares=(0.5, 0.5)), "routing.budget.*1.5, the mean of"),
  ],
)
def test_shares_that_do_not_fit_are_refused(fields, line):
  with pytest.raises(ConfigError, match=line):
    RoutingConfig(**fields)
