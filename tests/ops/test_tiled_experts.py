"""What the loop over tiles may not touch. Values and gradients are tested against dense in routing/test_dispatch.py."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.ops.tiled_experts import tiled_experts

TOKENS, DIM, HIDDEN, TILE, ROWS = 5, 3, 4, 2, 12


@jax.jit
def values_and_gradients(x_TD, weights, gate_R, token_R, row_TK, dy_TD):
  def call(x_TD, weights, gate_R):
    return tiled_experts(x_TD, weights, gate_R, token_R, row_TK, jnp.asarray([2, 0, 4]), TILE)

  y_TD, backward = jax.vjp(call, x_TD, weights, gate_R)
  return y_TD, backward(dy_TD)


def run(garbage):
  """Expert 0 gets tokens 0 and 2, expert 2 tokens 1, 3 and 2; token 4 gets none. Rows 6.. are beyond all groups."""
  token_R = np.array([0, 2, 1, 3, 2, TOKENS] + [garbage["token"]] * 6, np.int32)
  gate_R = np.array([0.5, 0.25, 1.0, 0.75, 0.5, 0.0] + [garbage["gate"]] * 6, np.float32)
  row_TK = np.array([[0, ROWS], [2, ROWS], [1, 4], [3, ROWS], [ROWS, ROWS]], np.int32)
  rng = np.random.default_rng(0)
  shapes = ((3, DIM, HIDDEN), (3, DIM, HIDDEN), (3, HIDDEN, DIM), (TOKENS, DIM), (TOKENS, DIM))
  *weights, x_TD, dy_TD = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  for weight in weights:  # the middle expert has no rows: what it holds can have no effect
    weight[1] = garbage["idle"]
  return values_and_gradients(x_TD, ExpertWeights(*weights), gate_R, token_R, row_TK, dy_TD)


def test_rows_beyond_the_groups_and_idle_experts_are_never_read():
  calm = run({"token": TOKENS, "gate": 0.0, "idle": 1.0})
  wild = run({"token": 1, "gate": np.nan, "idle": np.nan})
  jax.tree.map(np.testing.assert_array_equal, calm, wild)
  y_TD, (dx_TD, d_weights, d_gate_R) = calm
  assert not np.any(y_TD[4]) and not np.any(dx_TD[4]) and np.all(y_TD[:4] != 0)
  assert not np.any(d_weights.gate_EDF[1]) and np.any(d_weights.gate_EDF[0]) and np.any(d_weights.gate_EDF[2])
  assert np.all(d_gate_R[:5] != 0) and not np.any(d_gate_R[5:])
