"""The attention layer: projections, QK-norm, positions, and the cache of decoding."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import ModelConfig
from moe_lab.nn.layers import rms_normalise
from moe_lab.nn.weights import Weight
from moe_lab.ops.alibi import alibi_slopes, windows
from moe_lab.ops.ring import Ring
from moe_lab.ops.rotary import rotate
from moe_lab.sharding.cache import spread_cached_attention
from moe_lab.sharding.sequence import spread_attention

LayerCache = tuple[Ring, ...]  # of one layer: its KV groups in order


def layer_slopes(config: ModelConfig) -> np.ndarray:
  """Returns slope_M, the slope of each KV group; zeros for rotary."""
  if config.position == "rotary":
    return np.zeros(config.num_kv_heads, np.float32)
  return alibi_slopes(config.num_kv_heads, config.num_global_groups) / np.float32(config.position_interpolation)


def layer_windows(config: ModelConfig) -> tuple[int | None, ...]:
  """Returns for each KV group how many keys a query has to look at; None: all.

  Derived from the slopes and the bound of QK-norm, not tuned; they stretch as slopes are interpolated.
  """
  return windows(layer_slopes(config), (config.qk_bound or None) if config.qk_norm else None)


def sharpened(q_BLNH: jax.Array, position: jax.Array, slope_M: jax.Array, start: int) -> jax.Array:
  """Returns queries whose logits, in groups without a slope, are log(position + 1) / log(start) times as large.

  Positions ([L] or [B, L]) before `start` stay as they are. Groups without a slope have no window, so that larger
  logits cut nothing off.
  """
  growth = jnp.maximum(jnp.log(position + 1.0) / math.log(start), 1.0)[..., None, None]
  global_N = jnp.repeat(slope_M == 0, q_BLNH.shape[2] // len(slope_M))[:, None]
  return (q_BLNH * jnp.where(global_N, growth, 1.0)).astype(q_BLNH.dtype)


class QKNorm(nn.Module):
  """RMS-normalises each head and scales it by a bounded gain.

  With both norms, |q.k| / sqrt(H) <= `bound`, since ||q|| and ||k|| are at most
  sqrt(H) times the largest gain. Windows are derived from that bound.

  Attributes:
    bound: 0: none.
    together: the letter of the heads' dimension, to normalise a token's heads together; "": each head.
    epsilon: added to the mean square.
  """

  bound: float
  together: str = ""
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x):
    limit = (self.bound * x.shape[-1] ** -0.5) ** 0.5 if self.bound else math.inf
    shape = x.shape[-2:] if self.together else x.shape[-1:]
    gain = self.param(f"gain_{self.together}H", nn.initializers.constant(min(1.0, limit)), shape, jnp.float32)
    rows = x.reshape(*x.shape[:-2], -1) if self.together else x
    normed = rms_normalise(rows, self.epsilon).reshape(x.shape)
    return (normed * jnp.clip(gain, -limit, limit)).astype(x.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention (arXiv 2305.13245)."""

  config: ModelConfig
  out_scale: float
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(self, x_BLD, segment_BL, offset, cache: LayerCache | None, row_B=None):
    """Returns the attended values [B, L, D] and the updated cache (None without one).

    With a cache the new keys are written at `offset` ([B]) of its rows `row_B` (None: every row in its place); all
    cached positions count as one document, the queries', and segment 0 is padding at its end.
    """
    config, dim = self.config, x_BLD.shape[-1]

    def project(name, heads):
      return Weight(self, name, dim**-0.5, (dim, heads, config.head_dim)).project("BLD,DNH->BLNH", x_BLD)

    q_BLNH = project("query_DNH", config.num_heads)
    k_BLMH = project("key_DMH", config.num_kv_heads)
    v_BLMH = project("value_DMH", config.num_kv_heads)
    if config.qkv_bias:
      q_BLNH += self._bias("query_bias_NH", q_BLNH)
      k_BLMH += self._bias("key_bias_MH", k_BLMH)
      v_BLMH += self._bias("value_bias_MH", v_BLMH)
    if config.qk_norm:
      queries, keys = ("N", "M") if config.qk_norm_over == "all" else ("", "")
      q_BLNH = QKNorm(config.qk_bound, queries, config.norm_epsilon, name="query_norm")(q_BLNH)
      k_BLMH = QKNorm(config.qk_bound, keys, config.norm_epsilon, name="key_norm")(k_BLMH)
    position = jnp.asarray(offset)[..., None] + jnp.arange(x_BLD.shape[1])
    if config.position == "rotary":
      interpolated = position / config.position_interpolation
      q_BLNH, k_BLMH = (
        rotate(heads, interpolated, config.rotary_base, config.rotary_stretch) for heads in (q_BLNH, k_BLMH)
      )
    slope_M = jnp.asarray(layer_slopes(config))
    if config.sharpen_from:
      q_BLNH = sharpened(q_BLNH, position, slope_M, config.sharpen_from)

    if cache is None:
      out_BLNH = spread_attention(
        q_BLNH,
        k_BLMH,
        v_BLMH,
        slope_M,
        segment_BL,
        self.mesh,
        offset=offset,
        window_M=layer_windows(config),
        backend=config.attention_backend,
        block=config.attention_block,
      )
    else:
      out_BLNH, cache = spread_cached_attention(
        q_BLNH,
        k_BLMH,
        v_BLMH,
        slope_M,
        segment_BL != 0,
        offset,
        cache,
        row_B,
        self.mesh,
        window_M=layer_windows(config),
        backend=config.attention_backend,
        block=config.attention_block,
      )
    std = self.out_scale * (config.num_heads * config.head_dim) ** -0.5
    out = Weight(self, "out_NHD", std, (config.num_heads, config.head_dim, dim))
    return out.project("BLNH,NHD->BLD", out_BLNH), cache

  def _bias(self, name: str, heads: jax.Array) -> jax.Array:
    return self.param(name, nn.initializers.zeros, heads.shape[-2:], jnp.float32).astype(heads.dtype)
