"""The weights of projections and experts: where they are declared, in which form, and how they multiply.

The form is a matter of the parameters' names alone, so that one model reads them all. A weight STEM_LETTERS is

  STEM_LETTERS                        a plain float32 array, as every model begins, or
  STEM_BOOK_LETTERS, STEM_scale_...   its codes in 4 bits and their scales (`ops/quantised.py`), and beside either
  STEM_a_..., STEM_b_...              may stand an adapter of low rank (LoRA, arXiv 2106.09685).

`adapt/` turns one form into another.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_lab.nn.layers import scaled_normal
from moe_lab.ops.grouped_mlp import ExpertWeights, num_experts_of
from moe_lab.ops.quantised import BOOKS, Quantised, dequantise
from moe_lab.routing.base import Assignment

ADAPTER_SCALE = 2.0  # of the adapter's product: LoRA's alpha / r
WATCHED = (
  "inputs"  # the collection in which weights leave the squares of what they are multiplied by, where it is asked for
)
# Dimensions that a weight contracts, by those it has. Leading E's are one matrix each.
CONTRACTED = {"DNH": "D", "DMH": "D", "NHD": "NH", "DF": "D", "FD": "F", "EDF": "D", "EFD": "F"}
FAMILIES = {
  "attention": ("query_DNH", "key_DMH", "value_DMH", "out_NHD"),
  "mlp": ("gate_DF", "up_DF", "down_FD"),  # of dense layers, and the shared experts
  "experts": ("gate_EDF", "up_EDF", "down_EFD"),
}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}


def part_name(name: str, part: str) -> str:
  """Returns the parameter's name of a part of the weight `name`: codes (of a book), scale, a or b."""
  stem, _, letters = name.rpartition("_")
  first, contracted = letters[: letters.startswith("E")], CONTRACTED[letters]
  if part == "a":
    letters = f"{first}{contracted}I"
  elif part == "b":
    letters = f"{first}I{letters.replace(contracted, '').removeprefix(first)}"
  return f"{stem}_{part}_{letters}"


def grouped_axis(name: str) -> int:
  """Returns the dimension along which a weight's codes share scales, counted from the end: the last contracted one."""
  letters = name.rpartition("_")[2]
  return letters.index(CONTRACTED[letters][-1]) - len(letters)


def stored_in(params: Mapping[str, jax.Array], name: str, size: int) -> jax.Array | Quantised:
  """Returns a weight in the form that a module's parameters have it, without an adapter; `size`: what it contracts."""
  book = next((book for book in BOOKS if part_name(name, book) in params), None)
  if book is None:
    return params[name]
  codes, scale = (params[part_name(name, part)] for part in (book, "scale"))
  return Quantised(codes, scale, book, size, grouped_axis(name))


class Weight:
  """A weight of a module that is being called; not a pytree, so it does not leave the call."""

  def __init__(self, module: nn.Module, name: str, std: float, shape: tuple[int, ...]):
    """Declares the weight, or finds it in the form that the module's parameters have.

    Args:
      module: that is being called.
      name: of the weight; ends with its dimensions.
      std: of its truncated normal start.
      shape: of the weight.
    """
    self._module, self._name = module, name

    def found(part):
      name = part_name(self._name, part)
      return module.get_variable("params", name) if module.has_variable("params", name) else None

    book = next((book for book in BOOKS if module.has_variable("params", part_name(name, book))), None)
    if book is None:
      self._stored = module.param(name, scaled_normal(std), shape, jnp.float32)
    else:
      axis = grouped_axis(name)
      self._stored = Quantised(found(book), found("scale"), book, shape[axis], axis)
    self._adapter = None if found("a") is None else (found("a"), found("b"))

  def dense(self) -> jax.Array:
    """Returns the whole weight, adapter included, float32."""
    letters = self._name.rpartition("_")[2]
    if self._adapter is None:
      return self._plain()
    a, b = (part_name(self._name, part).rpartition("_")[2] for part in ("a", "b"))
    return self._plain() + ADAPTER_SCALE * jnp.einsum(f"{a},{b}->{letters}", *self._adapter)

  def stored(self) -> jax.Array | Quantised:
    """Returns the weight as products of sorted rows take it: in 4 bits if it is so and has no adapter."""
    return self._stored if self._adapter is None else self.dense()

  def project(self, equation: str, x: jax.Array, dtype=None) -> jax.Array:
    """Returns einsum(equation, x, weight) of factors in the type of `x`; the result has that type too, or `dtype`."""
    self._watch(x)
    y = jnp.einsum(equation, x, self._plain().astype(x.dtype), preferred_element_type=dtype)
    if self._adapter is None:
      return y
    # Letters of the equation, which may write keys' heads as queries'.
    inputs, letters, outputs = equation.replace(",", "->").split("->")
    contracted = "".join(letter for letter in letters if letter in inputs)
    kept, rest = ("".join(x for x in part if x not in contracted) for part in (inputs, letters))
    a, b = (half.astype(x.dtype) for half in self._adapter)
    low = jnp.einsum(f"{inputs},{contracted}I->{kept}I", x, a, preferred_element_type=dtype)
    added = jnp.einsum(f"{kept}I,I{rest}->{outputs}", low.astype(x.dtype), b, preferred_element_type=dtype)
    return y + ADAPTER_SCALE * added

  def _plain(self) -> jax.Array:
    return dequantise(self._stored) if isinstance(self._stored, Quantised) else self._stored

  def _watch(self, x: jax.Array) -> None:
    """Leaves the sum of squares of what the weight is multiplied by, over tokens, and their number."""
    if watching(self._module):
      width = CONTRACTED[self._name.rpartition("_")[2]]
      tokens = x.ndim - len(width)
      square_sum = jnp.square(x.astype(jnp.float32)).sum(tuple(range(tokens)))
      leave(self._module, self._name, square_sum, jnp.float32(math.prod(x.shape[:tokens])))


def watching(module: nn.Module) -> bool:
  """Returns whether the squares of inputs are asked for; training and inference never do."""
  return module.is_mutable_collection(WATCHED) and not module.is_initializing()


def leave(module: nn.Module, name: str, square_sum: jax.Array, count: jax.Array) -> None:
  """Leaves (sum of squares, number of tokens) of a weight's inputs in the collection `WATCHED`."""
  module.sow(WATCHED, name, (square_sum, count), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def watch_experts(module: nn.Module, x_TD: jax.Array, assignment: Assignment, weights: ExpertWeights) -> None:
  """Leaves the squares of what each expert's weights are multiplied by: over the tokens that it was given."""
  if not watching(module):
    return
  num_experts = num_experts_of(weights)
  taken_TKE = jax.nn.one_hot(assignment.expert_TK, num_experts) * assignment.valid_TK[..., None]
  x_TD = x_TD.astype(jnp.float32)

  def one(expert):  # expert by expert, or the hidden activations of all of them would be held at once
    gate_DF, up_DF, _, taken_T = expert
    hidden_TF = jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)
    return taken_T @ jnp.square(x_TD), taken_T @ jnp.square(hidden_TF)

  taken_ET = taken_TKE.sum(1).T
  x_ED, hidden_EF = jax.lax.map(one, (*weights, taken_ET))
  for name, square_sum in (("gate_EDF", x_ED), ("up_EDF", x_ED), ("down_EFD", hidden_EF)):
    leave(module, name, square_sum, taken_ET.sum(1))
