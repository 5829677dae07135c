"""Attention by a stock flash kernel, cuDNN's, which knows causality and nothing of slopes, windows or documents.

A causal row's constants cancel in softmax: -m * (i - j) is m * j up to one. So a slope is a feature of the key's
position, m * j, beside a 1 of the query. At 128K that product loses 0.008 of a logit to float32; positions are
therefore counted within chunks. A chunk is as long as the group's window: its queries look at it and at the chunk
before, and at nothing else, so that m * j stays within two windows, where float32 keeps 1e-5. In bfloat16 the feature
is three, which add up to it.

What it serves: training's shapes with one document a row (long documents, synthetic tasks), bfloat16, heads of up to
120 on an Ampere GPU and up to 248 on a Hopper. A quarter of a windowed group's work is wasted on a chunk that only
fills the square which the kernel wants. For packed documents, float32 and decoding on GPU there is `blocked`, which
`auto` takes there: it is plain XLA, and skips by the same windows. Not run on a GPU yet: the mathematics is tested
through the same call's XLA implementation.
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
_FEATURES = 8  # kernels want widths of multiples of 8; three are used


def check_here(q_BLNH: jax.Array, k_BSMH: jax.Array) -> None:
  """Raises ConfigError where the kernel cannot do what is asked of it."""
  field = "model.attention_backend"
  if jax.default_backend() != "gpu":
    wanted = f"auto, reference or blocked: the kernel needs a GPU, and the device here is {jax.default_backend()}"
    raise ConfigError(field, "flash", wanted)
  if q_BLNH.dtype != jnp.bfloat16:
    raise ConfigError(field, "flash", f"auto, reference or blocked, since model.dtype is {q_BLNH.dtype}")
  if q_BLNH.shape[1] != k_BSMH.shape[1]:
    raise ConfigError(field, "flash", "auto, reference or blocked, since queries are not those of all keys (decoding)")


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


def _windowed(q_BLNH, k_BSMH, v_BSMH, slope_M, chunk: int, implementation: str):
  """Attention within a chunk and the one before it."""
  length, width = q_BLNH.shape[1], q_BLNH.shape[3]
  q, k, v = (rearrange(pad_length(x, chunk, 1), "B (c l) n H -> B c l n H", l=chunk) for x in (q_BLNH, k_BSMH, v_BSMH))
  # The kernel's causality is that of a square: queries of nobody stand before the chunk's own.
  q = jnp.concatenate([jnp.zeros_like(q), q], axis=2)
  k, v = (jnp.concatenate([jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * 3)[:, :-1], x], axis=2) for x in (k, v))
  scale = width**-0.5
  logit_LM = slope_M * (jnp.arange(2 * chunk) - 2 * chunk + 1).astype(jnp.float32)[:, None]
  exists_cL = jnp.arange(q.shape[1])[:, None] * chunk + jnp.arange(2 * chunk) >= chunk
  feature_cLM = jnp.where(exists_cL[:, :, None], logit_LM, _NEVER) / scale
  out = jax.nn.dot_product_attention(
    *(
      rearrange(x, "B c l n H -> (B c) l n H")
      for x in (
        _with_features(q, [jnp.ones(())] * 3),
        _with_features(k, _parts(feature_cLM, k.dtype)),
        _with_features(v, [jnp.zeros(())] * 3),
      )
    ),
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )
  out = rearrange(out[:, chunk:, :, :width], "(B c) l n H -> B (c l) n H", c=q.shape[1])
  return out[:, :length]


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
  """As `attention.attention` of sequences to themselves, where each is one document.

  Whether it is, and whether a group without a window has slope 0, only the run shows: where not, the result is NaN.

  Args:
    q_BLNH: queries.
    k_BLMH: keys.
    v_BLMH: values.
    slope_M: float32; 0 where there is no window.
    segment_BL: int32, documents; 0 is padding, which may follow.
    window_M: of each group; None: all keys.
    implementation: of `jax.nn.dot_product_attention`: cudnn | xla (anywhere, for tests; not linear in memory).

  Returns:
    [B, L, N, H].
  """
  num_kv_heads, width = k_BLMH.shape[2:]
  q_BLMGH = rearrange(q_BLNH, "B L (M G) H -> B L M G H", M=num_kv_heads)
  chunk_M = [None if window is None else chunk_of(window) for window in window_M]
  outs, order = [], []
  for chunk in dict.fromkeys(chunk_M):
    groups = np.array([m for m, other in enumerate(chunk_M) if other == chunk])
    q = rearrange(q_BLMGH[:, :, groups], "B L M G H -> B L (M G) H")
    k, v, slope = k_BLMH[:, :, groups], v_BLMH[:, :, groups], slope_M[groups]
    if chunk is None:
      out = jax.nn.dot_product_attention(q, k, v, scale=width**-0.5, is_causal=True, implementation=implementation)
      out = jnp.where((slope == 0).all(), out, jnp.nan)
    else:
      out = _windowed(q, k, v, slope, chunk, implementation)
    outs.append(rearrange(out, "B L (M G) H -> B L M G H", M=len(groups)))
    order += groups.tolist()
  out_BLMGH = jnp.concatenate(outs, axis=2)[:, :, np.argsort(order)]
  served_BL = (segment_BL == segment_BL[:, :1]) | (segment_BL == 0)
  out_BLNH = rearrange(out_BLMGH, "B L M G H -> B L (M G) H")
  return jnp.where(served_BL[:, :, None, None], out_BLNH, jnp.nan).astype(q_BLNH.dtype)
