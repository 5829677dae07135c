"""What the loop over tiles may not touch. Values and gradients are tested against dense in routing/test_dispatch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.ops.tiled_experts import tile_sizes, tiled_experts

TOKENS, DIM, HIDDEN, ROWS = 5, 3, 4, 12


@jax.jit
def values_and_gradients(x_TD, weights, gate_R, token_R, dy_TD):
  def call(x_TD, weights, gate_R):
    return tiled_experts(x_TD, weights, gate_R, token_R, jnp.asarray([2, 0, 3]), (4, 2))

  y_TD, backward = jax.vjp(call, x_TD, weights, gate_R)
  return y_TD, backward(dy_TD)


def run(garbage):
  """Expert 0 gets tokens 0 and 2, expert 2 tokens 1, 3 and 2; token 4 gets none. Rows 5.. are beyond all groups."""
  token_R = np.array([0, 2, 1, 3, 2] + [garbage["token"]] * 7, np.int32)
  gate_R = np.array([0.5, 0.25, 1.0, 0.75, 0.5] + [garbage["gate"]] * 7, np.float32)
  rng = np.random.default_rng(0)
  shapes = ((3, DIM, HIDDEN), (3, DIM, HIDDEN), (3, HIDDEN, DIM), (TOKENS, DIM), (TOKENS, DIM))
  *weights, x_TD, dy_TD = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  for weight in weights:  # the middle expert has no rows: what it holds can have no effect
    weight[1] = garbage["idle"]
  return values_and_gradients(x_TD, ExpertWeights(*weights), gate_R, token_R, dy_TD)


def test_rows_beyond_the_groups_and_idle_experts_are_never_read():
  calm = run({"token": TOKENS, "gate": 0.0, "idle": 1.0})
  wild = run({"token": 1, "gate": np.nan, "idle": np.nan})
  jax.tree.map(np.testing.assert_array_equal, calm, wild)
  y_TD, (dx_TD, d_weights, d_gate_R) = calm
  assert not np.any(y_TD[4]) and not np.any(dx_TD[4]) and np.all(y_TD[:4] != 0)
  assert not np.any(d_weights.gate_EDF[1]) and np.any(d_weights.gate_EDF[0]) and np.any(d_weights.gate_EDF[2])
  assert np.all(d_gate_R[:5] != 0) and not np.any(d_gate_R[5:])


@pytest.mark.parametrize("mean_rows, tiles", [(2048, (512, 128, 32)), (511, (128, 32, 8)), (32, (32, 8)), (3, (8,))])
def test_tile_sizes_fit_the_mean_load(mean_rows, tiles):
  assert tile_sizes(mean_rows) == tiles
