"""Compiles programs for chips that are not here, and reads off what each of them would hold and send."""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.preflight.hlo import Collective, collectives
from moe_lab.sharding.rules import batch_sharding, state_shardings
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import EXPERTS, abstract_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

# What the compiler says that is not there: all that it would hold, or where already they are too many, the temporaries.
_ALL_USED = re.compile(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm")
_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program as the compiler left it; bytes are a chip's.

  Attributes:
    parameter_bytes: of the parameters' part that a chip holds.
    expert_bytes: of these, the experts'.
    optimizer_bytes: of its moments.
    cache_bytes: of keys and values, in generation.
    temporary_bytes: of activations, gathered weights and all else within a step; None where it ran out of memory.
    peak_bytes: the most that is held at a time, by the compiler's plan.
    ran_out: whether the compiler gave up because that is more than there is.
    collectives: what chips send each other in a step; none are known where it ran out.
    compile_seconds: it took.
  """

  parameter_bytes: int
  optimizer_bytes: int
  temporary_bytes: int | None
  peak_bytes: int
  collectives: list[Collective]
  compile_seconds: float
  expert_bytes: int = 0
  cache_bytes: int = 0
  ran_out: bool = False


def sharded_bytes(tree) -> int:
  """Returns the bytes of a chip's part of arrays, given as shapes with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(int(jnp.dtype(x.dtype).itemsize) * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)


def train_step_inputs(config: Config, mesh: Mesh):
  """Returns the shapes of a training state and a batch, spread over the mesh."""
  state = abstract_state(config)
  rows = jax.ShapeDtypeStruct(
    (config.train.batch_size, config.data.seq_len + 1),
    jnp.int32,
    sharding=batch_sharding(mesh, config.train.batch_size),
  )
  state = jax.tree.map(lambda x, where: x.update(sharding=where), state, state_shardings(state, mesh))
  return state, Batch(rows, rows, rows)


def compile_train_step(config: Config, mesh: Mesh) -> Compiled:
  """Compiles the whole step: accumulation, optimizer and controllers, as `train.loop` runs it."""
  state, batch = train_step_inputs(config, mesh)
  optimizer = make_optimizer(config.train)
  lowered = make_train_step(config, Transformer(config, mesh), optimizer).lower(state, batch)
  return dataclasses.replace(
    read_off(lowered, state.params, (state, batch), mesh), optimizer_bytes=sharded_bytes(state.opt_state)
  )


def read_off(lowered: jax.stages.Lowered, params, arguments, mesh: Mesh) -> Compiled:
  """Compiles a program, and reads off what it says but for the bytes of optimizer and cache.

  Args:
    lowered: of the program.
    params: the model's, as shapes with shardings.
    arguments: all that the program is given, likewise.
    mesh: of devices.
  """
  experts = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0] if path[-1].key.endswith(EXPERTS)]
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = bytes_used(str(error), sharded_bytes(arguments))
    if used is None:
      raise
    temporary, collected = None, []
  else:
    used, temporary = _planned(compiled.memory_analysis())
    collected = collectives(compiled.as_text(), _slice_sizes(mesh))
  return Compiled(
    parameter_bytes=sharded_bytes(params),
    expert_bytes=sharded_bytes(experts),
    optimizer_bytes=0,
    temporary_bytes=temporary,
    peak_bytes=used,
    collectives=collected,
    compile_seconds=time.perf_counter() - start,
    ran_out=temporary is None,
  )


def _slice_sizes(mesh: Mesh) -> dict[str, int]:
  """Returns axis -> devices of one slice: each runs a program of its own, with some of the copies of the model."""
  slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
  return dict(mesh.shape) | {"data": mesh.shape["data"] // slices}


def bytes_used(message: str, arguments: int) -> int | None:
  """Returns the bytes that a program would have held, by the compiler's complaint; None if that is of something else.

  Args:
    message: of the error.
    arguments: bytes that a chip holds of what the program is given.
  """
  if match := _ALL_USED.search(message):
    return int(float(match[1]) * _UNITS[match[2]])
  match = _TEMPORARIES.search(message)
  return arguments + int(float(match[1]) * _UNITS[match[2]]) if match else None


def _planned(memory) -> tuple[int, int]:
  """Returns the most bytes held at a time, and those that are neither arguments nor results."""
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = getattr(memory, "peak_memory_in_bytes", 0) or held + memory.temp_size_in_bytes
  return peak, memory.temp_size_in_bytes
