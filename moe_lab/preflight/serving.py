"""The engine's two programs, compiled for chips that are not here: a chunk of prompts, and a step of decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_lab.config.schema import Config
from moe_lab.infer import programs
from moe_lab.infer.cache import empty_cache
from moe_lab.infer.engine import READERS
from moe_lab.infer.placement import check_mesh, served, shardings
from moe_lab.nn.transformer import Transformer
from moe_lab.preflight.compile import Compiled, read_off, sharded_bytes
from moe_lab.train.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Serving:
  """What is served.

  Attributes:
    program: decode | prefill.
    slots: sequences in the cache.
    context: positions that each has room for.
    chunk: tokens of a prompt that are read at a time.
  """

  program: str
  slots: int
  context: int
  chunk: int

  @property
  def rows(self) -> int:
    """Sequences that a run of the program works on."""
    return self.slots if self.program == "decode" else min(self.slots, READERS)

  @property
  def tokens(self) -> int:
    """That go through the model in a run."""
    return self.rows * (1 if self.program == "decode" else self.chunk)


def _placed(tree, where):
  """Returns shapes with their shardings; `where`: one, or a tree of them."""
  return jax.tree.map(lambda sharding, part: jax.tree.map(lambda x: x.update(sharding=sharding), part), where, tree)


def compile_serving(config: Config, mesh: Mesh, serving: Serving) -> Compiled:
  """Compiles one step of decoding in all slots, or one chunk of the prompts that are read together.

  Raises:
    UserError: the mesh does not divide the slots or the chunk.
  """
  check_mesh(mesh, serving.slots, min(serving.slots, READERS), serving.chunk)
  state = abstract_state(config)
  params = jax.eval_shape(functools.partial(served, config=config.model), state.params)
  by_name, by_ring, by_slot = shardings(mesh, params, serving.slots)
  everywhere = NamedSharding(mesh, P())
  empty = functools.partial(
    empty_cache, config.model, serving.slots, serving.context, serving.chunk, mesh.shape["model"]
  )
  params, cache = _placed(params, by_name), _placed(jax.eval_shape(empty), by_ring)
  slots = _placed(jax.eval_shape(lambda: programs.free_slots(serving.slots)), by_slot)
  model = Transformer(config, mesh, unrolled=True)
  if serving.program == "decode":
    run = functools.partial(programs.decode, model, None, 1)
    last = _placed(jax.ShapeDtypeStruct((serving.slots,), bool), by_slot)
  else:
    run = functools.partial(programs.read, model, None, False)
    last = _placed(jax.eval_shape(lambda: _chunk(serving)), everywhere)
  program = jax.jit(run, donate_argnums=(2, 3), out_shardings=(by_ring, by_slot, None))
  arguments = params, _placed(state.router_state, everywhere), cache, slots, last
  compiled = read_off(program.lower(*arguments), params, arguments, mesh)
  return dataclasses.replace(compiled, cache_bytes=sharded_bytes(cache))


def _chunk(serving: Serving) -> programs.Chunk:
  ints, tokens = jnp.zeros(serving.rows, jnp.int32), jnp.zeros((serving.rows, serving.chunk), jnp.int32)
  entry = programs.free_slots(serving.rows)
  return programs.Chunk(tokens, tokens, ints, ints, ints, jnp.zeros(serving.rows, bool), entry)
