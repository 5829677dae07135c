"""What an engine holds, and where: one device holds everything, or many share parameters, slots and cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_lab.config.schema import ModelConfig
from moe_lab.errors import ConfigError, UserError
from moe_lab.nn.transformer import unstack_layers
from moe_lab.sharding.cache import ring_spec
from moe_lab.sharding.rules import BATCH, COPIED, batch_sharding, num_along, params_shardings, token_spec


def served(params: Any, config: ModelConfig) -> dict:
  """Returns parameters as decoding wants them: layer by layer, matrices in the type that they are multiplied in.

  Every step reads all of them, so with bfloat16 that is half the memory and half the time. What routers decide by
  stays in float32, and what is in 4 bits as it is.
  """

  def one(path, leaf):
    cast = leaf.dtype == jnp.float32 and path[-1].key not in COPIED
    return leaf.astype(config.dtype, copy=False) if cast else leaf  # jax's, or numpy's in host memory

  return jax.tree_util.tree_map_with_path(one, unstack_layers(params))


def check_mesh(mesh: Mesh, slots: int, readers: int, chunk: int) -> None:
  """Raises UserError if the mesh cannot share so many slots, or chunks of so many tokens of `readers` prompts."""
  if mesh.shape["sequence"] > 1:
    wanted = "1 where text is generated: a step has one token of each sequence"
    raise ConfigError("mesh.sequence", mesh.shape["sequence"], wanted)
  if mesh.size == 1:
    return
  devices = num_along(mesh, BATCH)
  if slots % devices:
    raise UserError(f"slots={slots}: wanted a multiple of {devices}, the devices along data, fsdp and expert")
  if token_spec(mesh, readers, chunk) == P():
    raise UserError(f"chunk={chunk}: wanted a multiple of {devices}, the devices along data, fsdp and expert")


def shardings(mesh: Mesh, params: Any, slots: int) -> tuple[Any, NamedSharding, NamedSharding]:
  """Returns how served parameters, every ring of the cache, and the slots' arrays are spread."""
  return (
    params_shardings(params, mesh),
    NamedSharding(mesh, ring_spec(mesh, slots)),
    batch_sharding(mesh, slots),
  )
