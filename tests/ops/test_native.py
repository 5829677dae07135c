"""Building the CPU kernels, and the experts' at sizes that span blocks, chunks and threads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.errors import RunError
from moe_lab.ops import native
from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.routing.base import Assignment
from moe_lab.routing.dispatch import dispatch, experts_backend

HAVE_COMPILER = native.available()
# T, K, E, D, F: columns past a block of 256, widths that no vector divides, one token, many more rows than a chunk.
SIZES = [(700, 4, 5, 300, 270), (101, 3, 7, 40, 33), (1, 2, 8, 64, 32), (2500, 2, 3, 32, 48)]


def random_case(tokens, slots, experts, dim, hidden, same):
  keys = jax.random.split(jax.random.key(0), 7)
  shapes = ((experts, dim, hidden), (experts, dim, hidden), (experts, hidden, dim))
  weights = ExpertWeights(*(jax.random.normal(k, s) * s[1] ** -0.5 for k, s in zip(keys, shapes, strict=False)))
  expert_TK = jax.lax.top_k(jax.random.normal(keys[3], (tokens, experts)), slots)[1]
  if same:
    expert_TK = jnp.tile(jnp.arange(slots), (tokens, 1))
  valid_TK = jax.random.uniform(keys[4], (tokens, slots)) < 0.8
  gate_TK = jnp.where(valid_TK, jax.random.uniform(keys[5], (tokens, slots)), 0)
  x_TD, dy_TD = jax.random.normal(keys[6], (2, tokens, dim))
  return x_TD, weights, Assignment(expert_TK, gate_TK, valid_TK), dy_TD


def both_ways(x_TD, weights, assignment, dy_TD, **way):
  @jax.jit
  def run(x_TD, weights, gate_TK):
    def call(*inputs):
      return dispatch(inputs[0], assignment._replace(gate_TK=inputs[2]), inputs[1], **way)[0]

    y_TD, backward = jax.vjp(call, x_TD, weights, gate_TK)
    return y_TD, backward(dy_TD)

  return run(x_TD, weights, assignment.gate_TK)


@pytest.mark.parametrize("same", [False, True], ids=["random", "same_experts"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts_equal_dense(size, same):
  case = random_case(*size, same)
  got = both_ways(*case, experts="native" if HAVE_COMPILER else "auto")
  for one, want in zip(jax.tree.leaves(got), jax.tree.leaves(both_ways(*case, backend="dense")), strict=True):
    np.testing.assert_allclose(one, want, atol=5e-6 * float(jnp.abs(want).max() + 1e-9))


def test_the_same_call_gives_the_same_bits():
  case = random_case(2500, 2, 3, 32, 48, True)
  first = both_ways(*case, experts="auto")
  for _ in range(5):
    jax.tree.map(np.testing.assert_array_equal, first, both_ways(*case, experts="auto"))


def test_a_missing_compiler_is_told_and_left_out(monkeypatch, caplog):
  monkeypatch.setattr(native.shutil, "which", lambda name: None)
  with pytest.raises(RunError, match="no C.. compiler found; install one"):
    native.register.__wrapped__()
  monkeypatch.setattr(native, "register", native.register.__wrapped__)
  assert native.available.__wrapped__() is False
  assert "CPU kernels left out" in caplog.text


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch, tmp_path):
  compiler = tmp_path / "c++"
  compiler.write_text("#!/bin/sh\necho 'x.cc:1: error: no such option' >&2\nexit 1\n")
  compiler.chmod(0o755)
  monkeypatch.setenv("CXX", str(compiler))
  monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path))
  with pytest.raises(RunError, match="failed: x.cc:1: error: no such option"):
    native.register.__wrapped__()
  assert not list((tmp_path / "native").iterdir())  # nothing half made is left


def test_auto_takes_what_the_platform_has(monkeypatch):
  monkeypatch.setattr(native, "available", lambda: True)
  assert experts_backend("auto", "cpu") == "native" and experts_backend("auto", "tpu") == "ragged_dot"
  monkeypatch.setattr(native, "available", lambda: False)
  assert experts_backend("auto", "cpu") == "tiles"
  assert experts_backend("reference", "cpu") == "reference"
