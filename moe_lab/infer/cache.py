"""The key/value cache of decoding."""

import jax.numpy as jnp

from moe_lab.config.schema import ModelConfig
from moe_lab.nn.attention import KVCache


def empty_cache(config: ModelConfig, batch_size: int, length: int) -> KVCache:
  """Returns a cache for `length` positions, [Z, B, length, M, H], in the activations' type."""
  shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
  return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
