"""The attention layer: projections, QK-norm, positions, and the cache of decoding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import ModelConfig
from moe_lab.nn.layers import rms_normalise, scaled_normal
from moe_lab.ops.alibi import alibi_slopes, windows
from moe_lab.ops.attention import attention
from moe_lab.ops.rotary import rotate


def slopes_and_windows(config: ModelConfig) -> tuple[np.ndarray, tuple[int | None, ...]]:
  """Returns of each KV group its slope and how many keys a query has to look at (None: all), by `ops/alibi.py`.

  Both are constants of the configuration: windows are derived from the slopes and the bound of QK-norm, and stretch as
  slopes are interpolated.
  """
  if config.position == "rotary":
    return np.zeros(config.num_kv_heads, np.float32), (None,) * config.num_kv_heads
  slope_M = alibi_slopes(config.num_kv_heads, config.num_global_groups) / np.float32(config.position_interpolation)
  return slope_M, windows(slope_M, config.qk_bound if config.qk_norm else None)


class KVCache(NamedTuple):
  """Keys and values of the positions seen so far, [B, S, M, H]; [Z, ...] outside the scan."""

  k_BSMH: jax.Array
  v_BSMH: jax.Array


class QKNorm(nn.Module):
  """RMS-normalises each head and scales it by a bounded gain.

  With both norms, |q.k| / sqrt(H) <= `bound`, since ||q|| and ||k|| are at most
  sqrt(H) times the largest gain. Windows are derived from that bound.
  """

  bound: float

  @nn.compact
  def __call__(self, x):
    limit = (self.bound * x.shape[-1] ** -0.5) ** 0.5
    gain = self.param("gain_H", nn.initializers.constant(min(1.0, limit)), (x.shape[-1],), jnp.float32)
    return (rms_normalise(x) * jnp.clip(gain, -limit, limit)).astype(x.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention (arXiv 2305.13245)."""

  config: ModelConfig
  out_scale: float

  @nn.compact
  def __call__(self, x_BLD, segment_BL, offset, cache: KVCache | None):
    """Returns the attended values [B, L, D] and the updated cache (None without one).

    With a cache the new keys are written at `offset`; all cached positions
    count as one document, the queries'.
    """
    config, dim = self.config, x_BLD.shape[-1]

    def project(name, heads):
      kernel = self.param(name, scaled_normal(dim**-0.5), (dim, heads, config.head_dim), jnp.float32)
      return jnp.einsum("BLD,DNH->BLNH", x_BLD, kernel.astype(x_BLD.dtype))

    q_BLNH = project("query_DNH", config.num_heads)
    k_BLMH = project("key_DMH", config.num_kv_heads)
    v_BLMH = project("value_DMH", config.num_kv_heads)
    if config.qk_norm:
      q_BLNH = QKNorm(config.qk_bound, name="query_norm")(q_BLNH)
      k_BLMH = QKNorm(config.qk_bound, name="key_norm")(k_BLMH)
    if config.position == "rotary":
      position_L = (offset + jnp.arange(x_BLD.shape[1])) / config.position_interpolation
      q_BLNH, k_BLMH = (rotate(heads, position_L, config.rotary_base) for heads in (q_BLNH, k_BLMH))
    slope_M, window_M = slopes_and_windows(config)

    segment_BS = segment_BL
    if cache is not None:
      k_BLMH, v_BLMH = (
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), offset, axis=1)
        for old, new in zip(cache, (k_BLMH, v_BLMH), strict=True)
      )
      cache = KVCache(k_BLMH, v_BLMH)
      segment_BS = jnp.broadcast_to(segment_BL[:, :1], k_BLMH.shape[:2])
    out_BLNH = attention(
      q_BLNH,
      k_BLMH,
      v_BLMH,
      jnp.asarray(slope_M),
      segment_BL,
      segment_BS,
      offset=offset,
      window_M=window_M,
      backend=config.attention_backend,
      block=config.attention_block,
    )
    std = self.out_scale * (config.num_heads * config.head_dim) ** -0.5
    kernel = self.param("out_NHD", scaled_normal(std), (config.num_heads, config.head_dim, dim), jnp.float32)
    return jnp.einsum("BLNH,NHD->BLD", out_BLNH, kernel.astype(x_BLD.dtype)), cache
