"""Adapters by themselves: a small file, which goes with the model that they were trained beside."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.adapt.learning import ROUTING, join
from moe_lab.adapt.tensors import params_of, part_of, spelled, tensors
from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.io.arrays import read_npz
from moe_lab.strict_json import parse

_ABOUT = "about"  # the entry that says what the file is


def write_adapter(path: Path, params: Any, config: Config) -> dict:
  """Writes what training has changed: the adapters, and the routers' parameters unless these were frozen.

  Args:
    path: of the file, NAME.npz.
    params: of the adapted model.
    config: of its run.

  Returns:
    file, tensors, bytes.
  """
  with_router = config.adapt.router != "frozen"
  kept = {
    spelled(at): np.asarray(leaf)
    for at, leaf in tensors(params).items()
    if part_of(at[-1]) in ("a", "b") or (with_router and at[-1] in ROUTING)
  }
  about = {"format": "moe_lab adapter", "lora_rank": config.adapt.lora_rank, "lora_on": config.adapt.lora_on}
  with open(path, "wb") as file:
    np.savez(file, **kept, **{_ABOUT: np.array(json.dumps(about))})
  return {"file": str(path), "tensors": len(kept), "bytes": path.stat().st_size}


def read_adapter(path: Path) -> dict:
  """Returns the parameters in a file that `write_adapter` wrote.

  Raises:
    UserError: no such file, or it is something else. Nothing in it is executed.
  """
  try:
    found = read_npz(path)
    about = parse(str(found.pop(_ABOUT, "null")))
    if not isinstance(about, dict) or about.get("format") != "moe_lab adapter":
      raise ValueError("of another format")
    return params_of({tuple(name.split("/")): array for name, array in found.items()})
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"--adapter={path}: wanted an adapter.npz of experiments.adapt ({error})") from None


def with_adapter(params: Any, adapter: Any) -> dict:
  """Returns a model's parameters with an adapter beside them, and the routers that were trained with it.

  Raises:
    UserError: the adapter is of another model.
  """
  have, added = tensors(params), tensors(adapter)
  for at, leaf in added.items():
    old = have.get(at)
    if part_of(at[-1]) is None and (old is None or old.shape != leaf.shape):
      raise UserError(f"--adapter: {spelled(at)} has no counterpart in the base: wanted an adapter of this model")
  return join(adapter, params)
