"""The key/value cache of decoding: how large each KV group's ring is.

A windowed group (`ops/alibi.py`) keeps its window and room for one chunk; a global one keeps every position. Memory
then is what the slopes ask for, and not length times groups.
"""

import itertools
import math

import jax
import jax.numpy as jnp

from moe_lab.config.schema import ModelConfig
from moe_lab.nn.attention import LayerCache, layer_windows
from moe_lab.ops.ring import Ring
from moe_lab.sharding.sequence import common_windows

MULTIPLE = 64  # of ring sizes, so that groups with windows about alike share a ring


def ring_sizes(config: ModelConfig, capacity: int, chunk: int, shares: int = 1) -> tuple[int, ...]:
  """Returns the slots of each KV group's ring, of the groups that a device has.

  Args:
    config: of the model.
    capacity: positions of the longest sequence.
    chunk: the most positions that are written at a time.
    shares: devices that share the groups.
  """

  def size(window: int | None) -> int:
    # The first query of a chunk still needs its window when the last one's key is written.
    return capacity if window is None else min(capacity, math.ceil((window + chunk - 1) / MULTIPLE) * MULTIPLE)

  return tuple(map(size, common_windows(layer_windows(config), shares)))


def empty_cache(
  config: ModelConfig, batch_size: int, capacity: int, chunk: int, shares: int = 1
) -> tuple[LayerCache, ...]:
  """Returns the cache of each layer, in the activations' type; arguments as in `ring_sizes`."""

  def empty(size: int, groups: int):
    return jnp.zeros((batch_size, size, groups * shares, config.head_dim), config.dtype)

  runs = [(size, len(list(run))) for size, run in itertools.groupby(ring_sizes(config, capacity, chunk, shares))]
  return tuple(tuple(Ring(empty(*run), empty(*run)) for run in runs) for _ in range(config.num_layers))


def cache_bytes(config: ModelConfig, batch_size: int, capacity: int, chunk: int, shares: int = 1) -> int:
  """Returns the bytes of `empty_cache`."""
  cache = jax.eval_shape(lambda: empty_cache(config, batch_size, capacity, chunk, shares))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def full_cache_bytes(config: ModelConfig, batch_size: int, capacity: int) -> int:
  """Returns the bytes of a cache that keeps every position of every group."""
  values = 2 * config.num_layers * batch_size * capacity * config.num_kv_heads * config.head_dim
  return values * jnp.dtype(config.dtype).itemsize
