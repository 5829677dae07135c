"""How the presets' parameters are spread is written down, so that a change is seen: tests/golden/PRESET.sharding.txt.

python -m tests.sharding.test_golden    # writes them anew
"""

from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs import baselines, large_200b, medium_50b
from moe_lab.config.resolve import resolve
from moe_lab.sharding.rules import state_specs
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state

PRESETS = {
  "medium_50b": medium_50b.get_config,
  "large_200b": large_200b.get_config,
  "deepseek_moe_16b": lambda: baselines.get_config("deepseek_moe_16b"),
}
FOLDER = Path(__file__).parents[1] / "golden"


def spelled(name: str) -> str:
  """Returns a line for each parameter: its name, shape, and the mesh axis of each dimension."""
  config = resolve(PRESETS[name]())
  state = jax.eval_shape(lambda: initial_state(config, make_optimizer(config.train)))
  specs = jax.tree.leaves(state_specs(state).params, is_leaf=lambda x: isinstance(x, P))
  lines = []
  for (path, leaf), spec in zip(jax.tree_util.tree_flatten_with_path(state.params)[0], specs, strict=True):
    dims = [
      f"{size}:{axis}" if axis else str(size) for size, axis in zip(leaf.shape, (*spec, *[None] * 9), strict=False)
    ]
    lines.append(f"{'/'.join(part.key for part in path)} {' '.join(dims)}\n")
  return "".join(lines)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_spread_as_written_down(name):
  assert spelled(name) == (FOLDER / f"{name}.sharding.txt").read_text()


if __name__ == "__main__":
  for name in PRESETS:
    (FOLDER / f"{name}.sharding.txt").write_text(spelled(name))
