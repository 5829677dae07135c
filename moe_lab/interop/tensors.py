"""A table of tensor names to parameters and back: every tensor has its place, and every place its tensor.

A format is a tuple of `Row`s. A row whose parameter the model does not have is not used, so one table serves
models with and without biases or shared experts. What is not in the table, on either side, is an error.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import einops
import numpy as np

from moe_lab.errors import UserError

STACKS = ("dense_layers", "moe_layers")  # of layers, in order; their parameters are [Z, ...]
_PAIR = {"two": 2}  # sizes that a rule knows by name


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor.

  Attributes:
    name: in the file; {z} stands for the layer, {e} for the expert.
    path: of our parameter; "layers/" stands for either stack of layers, whose first axis is {z}. With {e} in the name
      the parameter's next axis is the expert.
    rule: how one tensor becomes its part of the parameter, as einops writes it: "(N H) D -> D N H". Letters as in
      `moe_lab/types.py`; "two" is 2.
  """

  name: str
  path: str
  rule: str


@dataclasses.dataclass(frozen=True)
class Place:
  """One tensor and the part of a parameter that it is.

  Attributes:
    name: in the file.
    path: of the parameter, the stack's name in it.
    index: of the part, (), (z,) or (z, e).
    rule: as in `Row`.
    sizes: of the rule's letters.
    shape: of the tensor in the file.
  """

  name: str
  path: str
  index: tuple[int, ...]
  rule: str
  sizes: Mapping[str, int]
  shape: tuple[int, ...]

  def inward(self, tensor: np.ndarray) -> np.ndarray:
    """Returns the part of the parameter, a view where it can be one."""
    return einops.rearrange(tensor, self.rule, **self._needed(self.rule))

  def outward(self, part: np.ndarray) -> np.ndarray:
    """Returns the tensor of a part of the parameter."""
    left, right = self.rule.split("->")
    rule = f"{right.strip()} -> {left.strip()}"
    return einops.rearrange(part, rule, **self._needed(rule))

  def _needed(self, rule: str) -> dict[str, int]:
    return {letter: size for letter, size in self.sizes.items() if letter in _letters(rule)}


class Reader(Protocol):
  """Where tensors come from, one at a time.

  Attributes:
    where: for errors.
    names: of all tensors, in the order in which they are best read.
  """

  where: str
  names: Sequence[str]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape; reads no tensor."""

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor."""


def places(rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
  """Returns every tensor of a model in a format.

  Args:
    rows: the format.
    shapes: of all parameters, by path.

  Raises:
    UserError: the format has no name for a parameter.
  """
  by_path = {row.path: row for row in rows}
  num_dense = max((shape[0] for path, shape in shapes.items() if path.startswith(f"{STACKS[0]}/")), default=0)
  found = []
  for path, shape in shapes.items():
    stack, _, rest = path.partition("/")
    stacked = stack in STACKS
    row = by_path.get(f"layers/{rest}" if stacked else path)
    if row is None:
      raise UserError(f"the parameter {path} has no name in this format")
    first = num_dense if stack == STACKS[1] else 0
    axes = (1 if stacked else 0) + ("{e}" in row.name)
    sizes = _sizes(row.rule, shape[axes:])
    theirs = tuple(math.prod(_size(letter, sizes) for letter in group) for group in _groups(row.rule.split("->")[0]))
    for index in np.ndindex(shape[:axes]):
      numbers = dict(zip("ze", (first + index[0], *index[1:]), strict=False)) if index else {}
      found.append(Place(row.name.format(**numbers), path, index, row.rule, sizes, theirs))
  assert len({place.name for place in found}) == len(found), "two parameters of one name"
  return found


def read_params(
  rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], reader: Reader, needless: str = r"(?!)"
) -> dict[str, np.ndarray]:
  """Reads a model. At any time there is one copy of it, and one tensor more.

  Args:
    rows: the format.
    shapes: of all parameters, by path.
    reader: of the file or files.
    needless: a regular expression; tensors of such names may be there and are left alone.

  Returns:
    float32 arrays by path.

  Raises:
    UserError: a tensor is missing, has another shape, or has no place in the model; one line that names it.
  """
  wanted = {place.name: place for place in places(rows, shapes)}
  names = set(reader.names)
  extra = sorted(name for name in names - wanted.keys() if not re.fullmatch(needless, name))
  for what, missed in (("has no tensor", [name for name in wanted if name not in names]), ("has a tensor", extra)):
    if missed:
      more = f" (and {len(missed) - 1} more)" if missed[1:] else ""
      wish = ", which the model needs" if what == "has no tensor" else ", for which the model has no place"
      raise UserError(f"{reader.where} {what} {missed[0]}{more}{wish}")
  for place in wanted.values():  # before the first is read
    if (shape := tuple(reader.shape(place.name))) != place.shape:
      raise UserError(f"{reader.where}: {place.name} is {list(shape)}: wanted {list(place.shape)}")
  params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
  read = 0
  for name in reader.names:
    if name in wanted:
      place = wanted[name]
      params[place.path][place.index] = place.inward(reader.read(name))
      read += math.prod(place.shape)
  # No two places overlap, so as many values as there are means that none was left as it came.
  assert read == sum(param.size for param in params.values()), "parameters that no tensor has filled"
  return params


def tensors(rows: Iterable[Row], params: Mapping[str, np.ndarray]) -> Iterator[tuple[Place, np.ndarray]]:
  """Yields every tensor of a model, float32, with its place; `params` are by path. Raises as `places`."""
  for place in places(rows, {path: np.shape(param) for path, param in params.items()}):
    yield place, place.outward(np.asarray(params[place.path])[place.index])


def _groups(side: str) -> list[list[str]]:
  """Returns the letters of each axis of one side of a rule: "(N H) D" is [["N", "H"], ["D"]]."""
  return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", side)]


def _letters(rule: str) -> set[str]:
  return set(re.findall(r"[A-Za-z]\w*", rule))


def _size(letter: str, sizes: Mapping[str, int]) -> int:
  return int(letter) if letter.isdecimal() else sizes[letter]


def _sizes(rule: str, shape: Sequence[int]) -> dict[str, int]:
  """Returns the size of each letter, from the shape of our side; of an axis of several all but one are known."""
  sizes = {letter: size for letter, size in _PAIR.items() if letter in _letters(rule)}
  for group, size in zip(_groups(rule.split("->")[1]), shape, strict=True):
    (unknown,) = [letter for letter in group if letter not in _PAIR]
    sizes[unknown] = size // math.prod(_PAIR[letter] for letter in group if letter in _PAIR)
  return sizes
