"""Experts over sorted rows: several back ends, one function. Another, `tiled_experts`, is tested with its dispatch."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from moe_lab.ops.grouped_mlp import (
  ExpertWeights,
  expert_of_row,
  grouped_mlp,
  tgmm_weight_gradient,
  xla_weight_gradient,
)

# tokamax is an extra: where it is installed it is held to the same.
BACKENDS = ["reference", "ragged_dot"] + (["tokamax"] if importlib.util.find_spec("tokamax") else [])
flags.FLAGS.mark_as_parsed()  # tokamax reads flags of its own; programs do the same
ROWS, DIM, EXPERTS, HIDDEN = 20, 6, 4, 5
GROUPS = {
  "all_rows_used": [8, 4, 4, 4],
  "empty_groups": [0, 8, 0, 12],
  "first_and_last_empty": [0, 12, 8, 0],
  "all_on_one": [0, 0, 20, 0],
  "unused_rows": [4, 0, 4, 0],
  "nothing": [0, 0, 0, 0],
}


def random_weights(seed=0):
  shapes = ((EXPERTS, DIM, HIDDEN), (EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN, DIM))
  keys = jax.random.split(jax.random.key(seed), 3)
  return ExpertWeights(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def by_loops(x_RD, weights, group_sizes):
  x_RD, (gate, up, down) = np.asarray(x_RD, np.float64), (np.asarray(w, np.float64) for w in weights)
  expert_R = np.repeat(np.arange(EXPERTS), group_sizes)
  y = [(x @ gate[e] / (1 + np.exp(-x @ gate[e])) * (x @ up[e])) @ down[e] for x, e in zip(x_RD, expert_R, strict=False)]
  return np.array(y).reshape(-1, DIM)


@functools.partial(jax.jit, static_argnames="backend")
def values_and_gradients(x_RD, weights, group_sizes_E, dy_RD, *, backend):
  y_RD, backward = jax.vjp(lambda x, w: grouped_mlp(x, w, group_sizes_E, backend=backend), x_RD, weights)
  return y_RD, *backward(dy_RD)


def random_case(name, dtype=jnp.float32):
  """Rows and cotangents are zero where no group is, as dispatch leaves them."""
  used = sum(GROUPS[name])
  x_RD, dy_RD = (
    (jax.random.normal(jax.random.key(seed), (ROWS, DIM)) * (jnp.arange(ROWS) < used)[:, None]).astype(dtype)
    for seed in (1, 2)
  )
  weights = jax.tree.map(lambda w: w.astype(dtype), random_weights())
  return used, (x_RD, weights, jnp.asarray(GROUPS[name], jnp.int32), dy_RD)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_number(backend):
  # D = F = 1, x = 2, gate 1, up 3, down 1/2: silu(2) = 2 / (1 + e^-2) = 1.7615942; * 6 * 1/2 = 5.2847825.
  weights = ExpertWeights(*(jnp.full((1, 1, 1), w) for w in (1.0, 3.0, 0.5)))
  y = grouped_mlp(jnp.full((1, 1), 2.0), weights, jnp.asarray([1]), backend=backend)
  np.testing.assert_allclose(y, [[5.2847825]], rtol=1e-6)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(name, backend):
  used, case = random_case(name)
  y_RD = values_and_gradients(*case, backend=backend)[0]
  np.testing.assert_allclose(y_RD[:used], by_loops(case[0][:used], case[1], GROUPS[name]), atol=2e-5)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_equal_the_reference(name, backend):
  used, case = random_case(name)
  _, dx_RD, d_weights = values_and_gradients(*case, backend=backend)
  _, want_dx_RD, want_d_weights = values_and_gradients(*case, backend="reference")
  np.testing.assert_allclose(dx_RD[:used], want_dx_RD[:used], atol=2e-5)
  for got, want in zip(d_weights, want_d_weights, strict=True):
    np.testing.assert_allclose(got, want, atol=5e-5)
    for expert, size in enumerate(GROUPS[name]):
      assert np.any(got[expert]) == (size > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_near_float32(backend):
  used, case = random_case("unused_rows", jnp.bfloat16)
  got = values_and_gradients(*case, backend=backend)
  want = values_and_gradients(*jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.float32), case),
                              backend="reference")  # fmt: skip
  assert got[0].dtype == jnp.bfloat16
  # The hidden product and the result are rounded to 2^-9 of their size; sums of five such.
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (a[:used], b[:used]) if a.shape == (ROWS, DIM) else (a, b)
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("name", GROUPS)
def test_the_kernel_of_the_weight_gradient_equals_xla(name):
  x_RD, dy_RF = (jax.random.normal(jax.random.key(seed), (24, width)) for seed, width in ((1, DIM), (2, HIDDEN)))
  groups_E = jnp.asarray(GROUPS[name], jnp.int32)
  got_EDF = tgmm_weight_gradient(x_RD, dy_RF, groups_E, interpret=True)
  np.testing.assert_allclose(got_EDF, xla_weight_gradient(x_RD, dy_RF, groups_E), atol=2e-5)


def like_a_kernel_for_gpu(x, y, group_sizes_E, contracted, groups):
  """What tokamax gives on a GPU: rows of no group hold NaN, and a sum over a group's rows masks by multiplying."""
  a, b = contracted
  group_ER = (expert_of_row(group_sizes_E, x.shape[0]) == jnp.arange(EXPERTS)[:, None]).astype(x.dtype)
  if not groups:
    return jnp.einsum("ER,RD,RF->EDF", group_ER, x, y)
  z = jnp.einsum("ER,RD,EDF->RF", group_ER, x, y if b == 1 else y.swapaxes(1, 2))
  return jnp.where(group_ER.any(0)[:, None], z, jnp.nan)


@pytest.mark.parametrize("name", GROUPS)
def test_what_kernels_leave_in_rows_of_no_group_goes_nowhere(name, monkeypatch):
  monkeypatch.setattr("moe_lab.ops.grouped_mlp._tokamax", like_a_kernel_for_gpu)
  used, case = random_case(name)
  got = values_and_gradients.__wrapped__(*case, backend="tokamax")
  want = values_and_gradients(*case, backend="reference")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (a[:used], b[:used]) if a.shape == (ROWS, DIM) else (a, b)
    np.testing.assert_allclose(a, b, atol=5e-5)


def test_a_wrong_name_fails():
  _, case = random_case("empty_groups")
  with pytest.raises(ValueError, match="loops.*wanted reference, ragged_dot or tokamax"):
    values_and_gradients(*case, backend="loops")
