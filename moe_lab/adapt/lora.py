"""Adapters of low rank beside frozen weights (LoRA, arXiv 2106.09685), also those in 4 bits (QLoRA, arXiv 2305.14314).

A token meets the adapters of as many experts as it takes, so an expert's rank is the configured one divided by the mean
number of experts, at least 1.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_lab.adapt.tensors import check_experts, counted, params_of, part_of, spelled, tensors, weights_in
from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.nn.layers import scaled_normal
from moe_lab.nn.weights import ADAPTER_SCALE, CONTRACTED, FAMILY, part_name


def rank(config: Config, family: str) -> int:
  """Returns the rank of a family's adapters."""
  whole = config.adapt.lora_rank
  return max(1, round(whole / config.routing.mean_count)) if family == "experts" else whole


def adapters(params: Any, config: Config, key: jax.Array) -> dict:
  """Returns new adapters alone: their product is zero.

  Args:
    params: plain, or their shapes; layers stacked or not.
    config: of the run; says which weights have one and of which rank.
    key: of their start.
  """
  by_path, made = tensors(params), {}
  for index, path in enumerate(weights_in(by_path, config.adapt.lora_on)):
    name, shape = path[-1], by_path[path].shape
    letters = name.rpartition("_")[2]
    stack, own = shape[: len(shape) - len(letters)], shape[len(shape) - len(letters) :]
    sizes = dict(zip(letters, own, strict=True)) | {"I": rank(config, FAMILY[name])}
    std = math.prod(sizes[letter] for letter in CONTRACTED[letters]) ** -0.5
    for part, start in (("a", scaled_normal(std)), ("b", scaled_normal(0))):
      part = part_name(name, part)
      of_part = (*stack, *(sizes[letter] for letter in part.rpartition("_")[2]))
      made[*path[:-1], part] = start(jax.random.fold_in(key, index), of_part, jnp.float32)
  return params_of(made)


def merged(params: Any) -> dict:
  """Returns plain parameters with the adapters' products added to their weights.

  Args:
    params: plain ones (`quantise.plain`), and adapters.

  Raises:
    UserError: an adapter has no weight, or lacks its other half.
  """
  by_path = tensors(params)
  made = {path: leaf for path, leaf in by_path.items() if part_of(path[-1]) is None}
  used = set()
  for path, leaf in made.items():
    if path[-1] not in FAMILY:
      continue
    a, b = ((*path[:-1], part_name(path[-1], part)) for part in ("a", "b"))
    if a in by_path and b in by_path:
      used |= {a, b}
      letters = (at[-1].rpartition("_")[2] for at in (a, b))
      equation = ",".join(f"...{one}" for one in letters) + "->..." + path[-1].rpartition("_")[2]
      # As the model adds them, in float32.
      made[path] = leaf + ADAPTER_SCALE * jnp.einsum(equation, by_path[a], by_path[b])
  left = sorted(by_path.keys() - made.keys() - used)
  if left:
    raise UserError(f"{spelled(left[0])} was left over: wanted adapters whose weights and other halves are there")
  return params_of(made)


def adapter_coverage(params: Any, added: Any, config: Config) -> dict:
  """Counts adapters, and holds them against the model.

  Args:
    params: plain, or their shapes.
    added: the adapters, or parameters that have them.
    config: of the run.

  Returns:
    tensors (adapted weights by family, a layer's each), rank (by family), adapter_parameters and their share.

  Raises:
    UserError: a tensor of experts has no adapter although the experts are to have them.
  """
  by_path = tensors(params)
  new = {path: leaf for path, leaf in tensors(added).items() if part_of(path[-1]) in ("a", "b")}
  adapted = [path for path in by_path if (*path[:-1], _half(path[-1])) in new]
  touched = counted(adapted, by_path)
  if "experts" in config.adapt.lora_on:
    check_experts(touched, by_path, config)
  if 2 * len(adapted) != len(new):
    raise UserError(f"{len(new)} tensors of adapters: wanted two for each of {len(adapted)} weights")
  size = sum(leaf.size for leaf in new.values())
  return {
    "tensors": touched,
    "rank": {family: rank(config, family) for family in touched},
    "adapter_parameters": size,
    "adapter_share": size / sum(leaf.size for leaf in by_path.values()),
  }


def _half(name: str) -> str:
  return part_name(name, "a") if name in FAMILY else name + "_"
