"""Experts and projections in 4 bits; routers, count heads, norms, embedding and head stay in float32.

A scale is chosen for the least error of the products, not of the weights: each weight's error counts by the mean square
of its input over a few batches, of each expert's by the tokens that it gets. An expert that hardly gets any borrows
from the others (16B mixtures lost ten points of HumanEval where rare experts had no samples of their own).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from moe_lab.adapt.tensors import (
  Path,
  Tensors,
  check_experts,
  counted,
  params_of,
  part_of,
  spelled,
  tensors,
  weights_in,
)
from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.nn.transformer import Transformer
from moe_lab.nn.weights import CONTRACTED, WATCHED, grouped_axis, part_name
from moe_lab.ops.quantised import BOOKS, Quantised, dequantise, quantise
from moe_lab.routing.base import RouterState
from moe_lab.types import Batch

PRIOR = 64.0  # tokens' worth of all experts' inputs that is added to each expert's own
FLOOR = 0.01  # of the mean square: what an input that was never seen counts
_FAMILIES = ("attention", "mlp", "experts")


def input_squares(config: Config, params: Any, router_state: RouterState, batches: Iterable[Batch]) -> Tensors:
  """Returns by weight the mean square of its inputs, [Z, ..., inputs], as `quantised` wants it.

  Args:
    config: of the model.
    params: plain.
    router_state: of the model.
    batches: without padding, as training has them.
  """
  model = Transformer(config)

  @jax.jit
  def one(params, batch: Batch) -> Any:
    token_BL, segment_BL = batch.tokens[:, :-1], batch.segments[:, :-1]
    budget_B = jnp.full(token_BL.shape[0], config.routing.mean_count, jnp.float32)
    _, seen = model.apply({"params": params}, token_BL, segment_BL, budget_B, router_state, mutable=[WATCHED])
    return seen[WATCHED]

  total = None
  for batch in batches:
    seen = one(params, batch)
    total = seen if total is None else jax.tree.map(jnp.add, total, seen)
  return {path: _mean_square(*pair, of_experts=path[-1].endswith(("_EDF", "_EFD"))) for path, pair in _pairs(total)}


def _pairs(collected: Any):
  """Yields (path, (sum of squares, count)); counts have the shape of what comes before the inputs' dimensions."""
  is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
  for path, pair in jax.tree_util.tree_flatten_with_path(collected, is_leaf=is_pair)[0]:
    yield tuple(key.key for key in path), pair


def _mean_square(total: jax.Array, count: jax.Array, of_experts: bool) -> jax.Array:
  if of_experts:  # [..., E, inputs] and [..., E]
    everyone = total.sum(-2, keepdims=True) / jnp.maximum(count.sum(-1), 1)[..., None, None]
    return (total + PRIOR * everyone) / (count + PRIOR)[..., None]
  return total / jnp.maximum(count, 1).reshape(count.shape + (1,) * (total.ndim - count.ndim))


def quantised(params: Any, book: str, squares: Tensors | None = None) -> dict:
  """Returns parameters with all experts and projections in 4 bits.

  Args:
    params: plain, layers stacked or not.
    book: int4 | nf4.
    squares: of `input_squares`; None: every input alike.
  """
  by_path = tensors(params)
  made = {}
  for path, leaf in by_path.items():
    if path not in weights_in({path: leaf}, _FAMILIES):
      made[path] = leaf
      continue
    importance = None if squares is None else _importance(path[-1], squares[path])
    coded = _quantise_slices(leaf, book, path[-1], importance)
    for part, value in ((book, coded.codes), ("scale", coded.scale)):
      made[*path[:-1], part_name(path[-1], part)] = value
  return params_of(made)


def _importance(name: str, square: jax.Array) -> jax.Array:
  """Returns mean squares [..., inputs] in the shape of the weight: 1 along its outputs."""
  letters = name.rpartition("_")[2]
  width = len(CONTRACTED[letters])
  inputs = tuple(range(-width, 0))
  square = square + FLOOR * square.mean(inputs, keepdims=True)
  outputs = len(letters) - letters.startswith("E") - width
  return square.reshape(square.shape + (1,) * outputs)


@functools.partial(jax.jit, static_argnames=("book", "name"))
def _quantise_slices(leaf: jax.Array, book: str, name: str, importance: jax.Array | None) -> Quantised:
  """Codes a tensor matrix by matrix: the search holds some copies of what it works on."""
  axis, letters = grouped_axis(name), name.rpartition("_")[2]
  matrix = len(letters) - letters.startswith("E")
  lead = leaf.shape[: leaf.ndim - matrix]
  flat = leaf.reshape(-1, *leaf.shape[leaf.ndim - matrix :])
  if importance is None:
    importance = jnp.ones((*lead, *[1] * matrix))
  importance = importance.reshape(-1, *importance.shape[importance.ndim - matrix :])
  coded = jax.lax.map(lambda pair: quantise(pair[0], book, axis, pair[1]), (flat, importance))
  return jax.tree.map(lambda part: part.reshape(*lead, *part.shape[1:]), coded)


def calibrated(
  config: Config, params: Any, router_state: RouterState, batches: Iterable[Batch], book: str
) -> tuple[dict, dict]:
  """Returns plain parameters in 4 bits, calibrated on `batches`, and the report of `coverage`; raises as that does."""
  made = quantised(params, book, input_squares(config, params, router_state, batches))
  return made, {"book": book} | coverage(params, made, config)


def plain(params: Any, sizes: Tensors) -> dict:
  """Returns parameters with what is in 4 bits as float32 arrays.

  Args:
    params: of any form; adapters stay beside their weights.
    sizes: the plain parameters' shapes, by path (`tensors` of an abstract state).
  """
  by_path, made = tensors(params), {}
  for path, leaf in by_path.items():
    part = part_of(path[-1])
    if part == "scale":
      continue
    if part in BOOKS:
      name = path[-1].replace(f"_{part}_", "_")
      axis = grouped_axis(name)
      size = sizes[*path[:-1], name].shape[axis]
      scale = by_path[*path[:-1], part_name(name, "scale")]
      made[*path[:-1], name] = dequantise(Quantised(leaf, scale, part, size, axis))
    else:
      made[path] = leaf
  return params_of(made)


def coverage(before: Any, after: Any, config: Config) -> dict:
  """Counts what `quantised` has done, and holds it against the model.

  Returns:
    tensors (by family, a layer's each), weights (how many are in 4 bits), bits_per_weight (codes and scales),
    bytes_per_parameter (of the whole model) and bytes.

  Raises:
    UserError: a tensor of experts was missed or is left over, or a weight's parts do not fit.
  """
  old, new = tensors(before), tensors(after)
  paths = weights_in(old, _FAMILIES)
  left = weights_in(new, _FAMILIES)
  if left:
    raise UserError(f"{spelled(left[0])} was missed: wanted it in 4 bits")
  made: set[Path] = set()
  weights = num_bits = 0
  for path in paths:
    name, book = path[-1], None
    for part in (*BOOKS, "scale"):
      at = (*path[:-1], part_name(name, part))
      if at in new:
        made.add(at)
        num_bits += 8 * new[at].nbytes
        book = part if part in BOOKS else book
    if book is None or (*path[:-1], part_name(name, "scale")) not in new:
      raise UserError(f"{spelled(path)} was lost: wanted its codes and scales")
    weights += old[path].size
  rest = old.keys() - set(paths)
  strange = sorted((new.keys() - made) ^ rest)
  if strange:
    raise UserError(f"{spelled(strange[0])} was left over: wanted only weights in 4 bits, and the rest as it was")
  touched = counted(paths, old)
  check_experts(touched, old, config)
  num_bytes = sum(leaf.nbytes for leaf in new.values())
  return {
    "tensors": touched,
    "weights": weights,
    "bits_per_weight": num_bits / weights,
    "bytes": num_bytes,
    "bytes_per_parameter": num_bytes / sum(leaf.size for leaf in old.values()),
  }
