"""Attention by a stock flash kernel, cuDNN's, which knows causality and nothing of slopes, windows or documents.

A causal row's constants cancel in softmax: -m * (i - j) is m * j up to one. So a slope is a feature of the key's
position, m * j, beside a 1 of the query. At 128K that product loses 0.008 of a logit to float32; positions of groups
with a window are therefore counted within chunks. A chunk is as long as the window: its queries look at it and at the
chunk before, and at nothing else, so that m * j stays within two windows, where float32 keeps 1e-5. In bfloat16 the
feature is three, which add up to it.

Documents are such a feature too. They follow each other, and causality hides the later ones: of what a query sees, its
own document has the highest number, and all earlier ones lie a whole `_APART` of logits lower for each that is between.

What it serves: training's shapes in bfloat16, heads of up to 120 on an Ampere GPU and up to 248 on a Hopper. A quarter
of a windowed group's work is wasted on a chunk that only fills the square which the kernel wants. For float32 and
decoding on GPU there is `blocked`, which `auto` takes there: it is plain XLA, and skips by the same windows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moe_lab.errors import ConfigError
from moe_lab.ops.blocked_attention import pad_length

_SHORTEST = 128  # of a chunk: slopes so steep that less would do leave m * j small anyway
_NEVER = -1e4  # a logit
_APART = 128.0  # logits between documents: further than any two keys, and 500 documents still leave 0.004 to float32
_FEATURES = 8  # kernels want widths of multiples of 8; three are used


def _refusal(q_BLNH: jax.Array, k_BSMH: jax.Array) -> str | None:
  """Returns why the kernel cannot do what is asked of it, or None where it can."""
  if jax.default_backend() != "gpu":
    return f": the kernel needs a GPU, and the device here is {jax.default_backend()}"
  if q_BLNH.dtype != jnp.bfloat16:
    return f", since model.dtype is {q_BLNH.dtype}"
  if q_BLNH.shape[1] != k_BSMH.shape[1]:
    return ", since queries are not those of all keys (decoding)"
  widest = (256 if float(jax.devices()[0].compute_capability) >= 9 else 128) - _FEATURES
  if q_BLNH.shape[3] > widest or q_BLNH.shape[3] % 8:
    return f", since this GPU's kernel takes heads of multiples of 8 up to {widest}, and model.head_dim is not"
  return None


def serves(q_BLNH: jax.Array, k_BSMH: jax.Array) -> bool:
  """Returns whether the kernel can do it here; queries that are as many as the keys are taken to be theirs."""
  return _refusal(q_BLNH, k_BSMH) is None


def check_here(q_BLNH: jax.Array, k_BSMH: jax.Array) -> None:
  """Raises ConfigError where the kernel cannot do what is asked of it."""
  if refusal := _refusal(q_BLNH, k_BSMH):
    raise ConfigError("model.attention_backend", "flash", "auto, reference or blocked" + refusal)


def chunk_of(window: int) -> int:
  """Returns the length of a group's chunks: its window, in multiples of 128."""
  return max(-(-window // _SHORTEST), 1) * _SHORTEST


def _parts(x, dtype) -> list[jax.Array]:
  """Three numbers of a type that add up to a float32: exactly so in bfloat16."""
  parts, type_info = [], jnp.finfo(dtype)
  for _ in range(3):
    # A conversion there and back XLA may leave out.
    parts.append(jax.lax.reduce_precision(x, type_info.nexp, type_info.nmant))
    x -= parts[-1]
  return [part.astype(dtype) for part in parts]


def _with_features(x, features: Sequence[jax.Array]):
  """Appends three features [..., heads] and zeros to an array [..., heads, H]."""
  features = jnp.stack([jnp.broadcast_to(feature, x.shape[:-1]) for feature in features], axis=-1).astype(x.dtype)
  return jnp.concatenate([x, features, jnp.zeros((*x.shape[:-1], _FEATURES - 3), x.dtype)], axis=-1)


def _attend(q_BLNH, k_BLMH, v_BLMH, logit_BLM, implementation: str):
  """Causal attention with a logit for each key."""
  width = q_BLNH.shape[3]
  scale = width**-0.5
  out_BLNH = jax.nn.dot_product_attention(
    _with_features(q_BLNH, [jnp.ones(())] * 3),
    _with_features(k_BLMH, _parts(logit_BLM / scale, k_BLMH.dtype)),
    _with_features(v_BLMH, [jnp.zeros(())] * 3),
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )
  return out_BLNH[..., :width]


def _key_logits(slope_M, document_BL):
  """Returns float32 [B, L, M] of a stretch of keys: their slopes' share and their documents', none above 0."""
  length = document_BL.shape[1]
  behind_L = jnp.arange(length, dtype=jnp.float32) - (length - 1)
  apart_BL = (document_BL - document_BL[:, -1:]).astype(jnp.float32) * _APART
  return slope_M * behind_L[:, None] + apart_BL[:, :, None]


def _whole(q_BLNH, k_BLMH, v_BLMH, slope_M, document_BL, implementation: str):
  """Attention to all earlier keys."""
  arrays = (pad_length(x, _SHORTEST, 1) for x in (q_BLNH, k_BLMH, v_BLMH))  # the kernel wants whole tiles
  document_BL = jnp.pad(document_BL, ((0, 0), (0, -document_BL.shape[1] % _SHORTEST)), mode="edge")
  return _attend(*arrays, _key_logits(slope_M, document_BL), implementation)[:, : q_BLNH.shape[1]]


def _windowed(q_BLNH, k_BLMH, v_BLMH, slope_M, document_BL, chunk: int, implementation: str):
  """Attention within a chunk and the one before it."""
  batch, length = document_BL.shape
  document_BL = jnp.pad(document_BL, ((0, 0), (0, -length % chunk)), mode="edge")
  q, k, v, document = (
    rearrange(pad_length(x, chunk, 1), "B (c l) ... -> B c l ...", l=chunk)
    for x in (q_BLNH, k_BLMH, v_BLMH, document_BL)
  )
  # The kernel's causality is that of a square: queries of nobody stand before the chunk's own.
  q = jnp.concatenate([jnp.zeros_like(q), q], axis=2)
  k, v, document = (
    jnp.concatenate([jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1), x], axis=2)
    for x in (k, v, document)
  )
  chunks = q.shape[1]
  q, k, v, document = (rearrange(x, "B c l ... -> (B c) l ...") for x in (q, k, v, document))
  exists_CL = jnp.tile(jnp.arange(chunks), batch)[:, None] * chunk + jnp.arange(2 * chunk) >= chunk
  logit_CLM = jnp.where(exists_CL[:, :, None], _key_logits(slope_M, document), _NEVER)
  out = _attend(q, k, v, logit_CLM, implementation)
  return rearrange(out[:, chunk:], "(B c) l n H -> B (c l) n H", c=chunks)[:, :length]


def flash_attention(
  q_BLNH: jax.Array,
  k_BLMH: jax.Array,
  v_BLMH: jax.Array,
  slope_M: jax.Array,
  segment_BL: jax.Array,
  *,
  window_M: Sequence[int | None],
  implementation: str = "cudnn",
) -> jax.Array:
  """As `attention.attention` of sequences to themselves.

  Documents have to be numbered in their order, as training's rows are. Whether they are, only the run shows: where not,
  the row's result is NaN.

  Args:
    q_BLNH: queries.
    k_BLMH: keys.
    v_BLMH: values.
    slope_M: float32.
    segment_BL: int32, documents; 0 is padding, which may follow.
    window_M: of each group; None: all keys.
    implementation: of `jax.nn.dot_product_attention`: cudnn | xla (anywhere, for tests; not linear in memory).

  Returns:
    [B, L, N, H].
  """
  num_kv_heads, length = k_BLMH.shape[2], q_BLNH.shape[1]
  # Padding is one more document.
  document_BL = jnp.where(segment_BL == 0, segment_BL.max(1, keepdims=True) + 1, segment_BL)
  q_BLMGH = rearrange(q_BLNH, "B L (M G) H -> B L M G H", M=num_kv_heads)
  # Chunks cost 2 * length * chunk, the whole square length^2 / 2.
  chunk_M = [None if window is None or 4 * chunk_of(window) > length else chunk_of(window) for window in window_M]
  outs, order = [], []
  for chunk in dict.fromkeys(chunk_M):
    groups = np.array([m for m, other in enumerate(chunk_M) if other == chunk])
    q = rearrange(q_BLMGH[:, :, groups], "B L M G H -> B L (M G) H")
    arrays = (q, k_BLMH[:, :, groups], v_BLMH[:, :, groups], slope_M[groups], document_BL)
    out = _whole(*arrays, implementation) if chunk is None else _windowed(*arrays, chunk, implementation)
    outs.append(rearrange(out, "B L (M G) H -> B L M G H", M=len(groups)))
    order += groups.tolist()
  out_BLMGH = jnp.concatenate(outs, axis=2)[:, :, np.argsort(order)]
  ordered_B = (document_BL[:, 1:] >= document_BL[:, :-1]).all(1)
  out_BLNH = rearrange(out_BLMGH, "B L M G H -> B L (M G) H")
  return jnp.where(ordered_B[:, None, None, None], out_BLNH, jnp.nan).astype(q_BLNH.dtype)
