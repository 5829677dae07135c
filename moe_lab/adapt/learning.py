"""Which parameters of an adapted model learn; the others are given to the step as they are, without gradient."""

from typing import Any

from moe_lab.adapt.tensors import params_of, part_of, tensors
from moe_lab.config.adapt import AdaptConfig
from moe_lab.sharding.rules import COPIED

HEADS = tuple(f"{head}_{part}" for head in ("policy", "value") for part in ("in", "bias", "out"))  # of the count policy
ROUTING = COPIED - {"gain_D", "gain_H"}  # parameters that decide which experts and how many


def learns(name: str, adapt: AdaptConfig) -> bool:
  """Returns whether a parameter of this name learns."""
  if adapt.learns in ("policy", "nothing"):
    return adapt.learns == "policy" and name in HEADS
  if name in ROUTING:
    return adapt.router != "frozen"
  return adapt.learns == "all" or part_of(name) in ("a", "b")


def split(params: Any, adapt: AdaptConfig) -> tuple[Any, Any]:
  """Returns the parameters that learn, and the others."""
  if adapt.learns == "all" and adapt.router != "frozen":
    return params, {}
  by_path = tensors(params)
  learning = {path: leaf for path, leaf in by_path.items() if learns(path[-1], adapt)}
  return params_of(learning), params_of({path: leaf for path, leaf in by_path.items() if path not in learning})


def join(first: Any, second: Any) -> Any:
  """Returns all parameters of two parts, such as `split` gives; where both have one it is the first's."""
  if not second:
    return first
  return params_of(tensors(second) | tensors(first))
