"""Weights in 4 bits: how they are coded, and the products that read them.

A code is an integer from -8 to 7, or the number of one of NF4's sixteen quantiles of a normal distribution (QLoRA,
arXiv 2305.14314). Sixteen neighbours along the contracted dimension share a scale of eight bits: 4.5 bits a weight in
all. The scale has a sign, so that whichever weight is largest in size can take the integers' longer side.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 16  # weights that share a scale
BOOKS = {  # the values of the sixteen codes, up to the scale; all within -8..8, so that scales are alike
  "int4": np.arange(-8, 8, dtype=np.float32),
  "nf4": np.float32(8)
  * np.float32([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
  ]),
}  # fmt: skip
SCALE_TYPE = jnp.float8_e4m3fn
# Of a stored scale: those of weights between 0.0005 and 14 then lie where float8 has its full precision.
UNIT = 2.0**-8
_LARGEST = float(jnp.finfo(SCALE_TYPE).max)
# Scales that are tried for a group, over the one that just holds its largest weight: a smaller one clips that weight
# and rounds the others more finely.
_FACTORS = np.float32(np.linspace(0.6, 1.15, 23))
_REFINEMENTS = 2  # times that the scale is then fitted to the codes and the codes to the scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
  """A weight in 4 bits, of shape [..., size, ...] with `size` at `axis`.

  Attributes:
    codes: uint8; at `axis` eight bytes for each group: byte j holds code j in its low bits and code j + 8 in its high
      ones, so that a group's halves lie apart and no kernel has to interleave them.
    scale: float8 (e4m3), over `UNIT`; at `axis` one for each group.
    book: name of the codes' values (`BOOKS`).
    size: weights along the contracted dimension; the last group may reach beyond.
    axis: the contracted dimension, counted from the end (< 0).
  """

  codes: jax.Array
  scale: jax.Array
  book: str = dataclasses.field(metadata={"static": True})
  size: int = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})


def _values(code: jax.Array, book: str) -> jax.Array:
  """Returns the float32 values of codes 0..15."""
  if book == "int4":
    return code.astype(jnp.float32) - 8
  return jnp.asarray(BOOKS[book])[code]


def _nearest(x: jax.Array, book: str) -> jax.Array:
  """Returns the codes (int32) whose values are nearest to `x`."""
  if book == "int4":
    return jnp.clip(jnp.round(x), -8, 7).astype(jnp.int32) + 8
  return jnp.searchsorted((BOOKS[book][1:] + BOOKS[book][:-1]) / 2, x).astype(jnp.int32)


def _rounded(scale: jax.Array) -> jax.Array:
  """Returns scales as they are stored."""
  return jnp.clip(scale / UNIT, -_LARGEST, _LARGEST).astype(SCALE_TYPE)


def scales_of(stored: jax.Array) -> jax.Array:
  """Returns float32 scales of stored ones."""
  return stored.astype(jnp.float32) * UNIT


def _coded(w: jax.Array, importance: jax.Array, stored: jax.Array, book: str):
  """Returns the codes under stored scales, and the weighted squared error of each group [..., 1]."""
  scale = scales_of(stored)
  code = _nearest(w / jnp.where(scale == 0, 1, scale), book)
  error = importance * jnp.square(w - scale * _values(code, book))
  return code, error.sum(-1, keepdims=True)


def _fitted(w: jax.Array, importance: jax.Array, book: str):
  """Returns codes and stored scales of groups [..., GROUP] that make the weighted squared error small."""
  largest = jnp.take_along_axis(w, jnp.argmax(jnp.abs(w), axis=-1, keepdims=True), axis=-1)
  start = largest / BOOKS[book][0]

  def keep_better(best, scale):
    stored = _rounded(scale)
    code, error = _coded(w, importance, stored, book)
    better = error < best[2]
    return jax.tree.map(lambda new, old: jnp.where(better, new, old), (code, stored, error), best), None

  first = _rounded(start)
  best = (*_coded(w, importance, first, book), first)
  best = (best[0], first, best[1])
  factors = np.concatenate([_FACTORS, -_FACTORS])
  best, _ = jax.lax.scan(lambda best, factor: keep_better(best, factor * start), best, factors)
  for _ in range(_REFINEMENTS):
    value = _values(best[0], book)
    square = (importance * jnp.square(value)).sum(-1, keepdims=True)
    best, _ = keep_better(best, (importance * w * value).sum(-1, keepdims=True) / jnp.where(square == 0, 1, square))
  return best[0], best[1]


@functools.partial(jax.jit, static_argnames=("book", "axis"))
def quantise(w: jax.Array, book: str, axis: int, importance: jax.Array | None = None) -> Quantised:
  """Returns a weight in 4 bits.

  The scale of each group is searched for the least squared error, each weight's counted by its importance: a product's
  error is what its inputs make of the weights'.

  Args:
    w: float32.
    book: int4 | nf4.
    axis: the contracted dimension, counted from the end (< 0).
    importance: >= 0, broadcasts against `w`: mean square of the input that a weight is multiplied by; None: all alike.
  """
  size = w.shape[axis]
  importance = jnp.ones_like(w) if importance is None else jnp.broadcast_to(importance, w.shape)

  def grouped(x):
    x = jnp.moveaxis(x, axis, -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % GROUP)])
    return x.reshape(*x.shape[:-1], -1, GROUP)

  code, scale = _fitted(grouped(w), grouped(importance), book)
  half = GROUP // 2
  byte = (code[..., :half] | code[..., half:] << 4).astype(jnp.uint8)
  return Quantised(
    codes=jnp.moveaxis(byte.reshape(*byte.shape[:-2], -1), -1, axis),
    scale=jnp.moveaxis(scale[..., 0], -1, axis),
    book=book,
    size=size,
    axis=axis,
  )


def dequantise(q: Quantised) -> jax.Array:
  """Returns the weight that the codes stand for, float32."""
  axis = q.codes.ndim + q.axis
  shape, groups = q.codes.shape, q.scale.shape[axis]
  byte = q.codes.reshape(*shape[:axis], groups, 1, GROUP // 2, *shape[axis + 1 :])
  code = jnp.concatenate([byte & 15, byte >> 4], axis=axis + 1)
  scale = jnp.expand_dims(scales_of(q.scale), (axis + 1, axis + 2))
  w = (_values(code, q.book) * scale).reshape(*shape[:axis], groups * GROUP, *shape[axis + 1 :])
  # A part of the weight, as another device may hold, has fewer groups than the whole.
  return jax.lax.slice_in_dim(w, 0, min(q.size, groups * GROUP), axis=axis)


def cast(w: jax.Array | Quantised, dtype) -> jax.Array | Quantised:
  """Returns a weight in a type; what is in 4 bits stays so."""
  return w if isinstance(w, Quantised) else w.astype(dtype)


def unpacked(w: jax.Array | Quantised, dtype) -> jax.Array:
  """Returns a weight as an array, in a type."""
  return (dequantise(w) if isinstance(w, Quantised) else w).astype(dtype)


def matrix_of(w_E: jax.Array | Quantised, expert: jax.Array, dtype) -> jax.Array:
  """Returns one expert's matrix; of weights in 4 bits only this one is unpacked."""
  return unpacked(jax.tree.map(lambda part: part[expert], w_E), dtype)


def bits(q: Quantised) -> int:
  """Returns how many bits the codes and scales of a weight take."""
  return 8 * (q.codes.size * q.codes.dtype.itemsize + q.scale.size * q.scale.dtype.itemsize)
