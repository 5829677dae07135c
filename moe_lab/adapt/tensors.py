"""A model's parameters as tensors with names, and the count that every transformation of them has to pass."""

import re
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.nn.weights import FAMILY

Path = tuple[str, ...]  # of a tensor: the modules, and the parameter's name
Tensors = dict[Path, jax.Array]

_PART = re.compile(r"_(int4|nf4|scale|a|b)_([A-Z]+)$")  # of a weight, in a parameter's name
_STACKS = ("moe_layers", "dense_layers")


def tensors(params: Any) -> Tensors:
  """Returns the parameters by path."""
  return flatten_dict(params)


def params_of(by_path: Tensors) -> dict:
  """Returns the parameters that `tensors` took apart."""
  return unflatten_dict(by_path)


def part_of(name: str) -> str | None:
  """Returns which part of a weight a parameter is: int4, nf4, scale, a or b; None for a plain one."""
  match = _PART.search(name)
  return match[1] if match else None


def spelled(path: Path) -> str:
  """Returns a path as an error line has it."""
  return "/".join(path)


def weights_in(by_path: Tensors, families: tuple[str, ...]) -> list[Path]:
  """Returns the paths of all plain weights of some families."""
  return [path for path in by_path if FAMILY.get(path[-1]) in families]


def counted(paths: list[Path], by_path: Tensors) -> dict[str, int]:
  """Returns how many tensors of each family there are, a layer's each, stacked or not."""
  count = dict.fromkeys(sorted({FAMILY[path[-1]] for path in paths}), 0)
  for path in paths:
    count[FAMILY[path[-1]]] += by_path[path].shape[0] if path[0] in _STACKS else 1
  return count


def check_experts(touched: dict[str, int], by_path: Tensors, config: Config) -> None:
  """Holds a transformation of the experts' weights against what the model must have.

  Libraries that adapt "every linear layer" leave experts out without a word: they are not layers to them.

  Args:
    touched: tensors that were transformed, by family.
    by_path: the parameters before.
    config: of the model.

  Raises:
    UserError: experts were missed, or there are tensors of experts that the transformation knows nothing of.
  """
  foreign = [p for p in by_path if re.search(r"_E[A-Z]{2,}$", p[-1]) and p[-1] not in FAMILY]
  if foreign:
    raise UserError(f"{spelled(foreign[0])} is a tensor of experts that was left over: wanted only plain {_known()}")
  wanted = 3 * (config.model.num_layers - config.model.num_dense_layers)
  if touched.get("experts", 0) != wanted:
    raise UserError(f"{touched.get('experts', 0)} tensors of experts were transformed: wanted {wanted}, {_known()}")


def _known() -> str:
  return "gate_EDF, up_EDF and down_EFD of each layer"
