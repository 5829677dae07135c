"""Compiles a training step for chips that are not here, and reads off what each of them would hold and send."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.preflight.hlo import Collective, collectives
from moe_lab.sharding.rules import batch_sharding, state_shardings
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program as the compiler left it; bytes are a chip's.

  Attributes:
    parameter_bytes: of the parameters' part that a chip holds.
    optimizer_bytes: of its moments.
    temporary_bytes: of activations, gathered weights and all else within a step.
    peak_bytes: the most that is held at a time, by the compiler's plan.
    collectives: what chips send each other in a step.
    compile_seconds: it took.
  """

  parameter_bytes: int
  optimizer_bytes: int
  temporary_bytes: int
  peak_bytes: int
  collectives: list[Collective]
  compile_seconds: float


def sharded_bytes(tree) -> int:
  """Returns the bytes of a chip's part of arrays, given as shapes with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(int(jnp.dtype(x.dtype).itemsize) * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)


def train_step_inputs(config: Config, mesh: Mesh):
  """Returns the shapes of a training state and a batch, spread over the mesh."""
  state = jax.eval_shape(lambda: initial_state(config, make_optimizer(config.train)))
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
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = getattr(memory, "peak_memory_in_bytes", 0) or held + memory.temp_size_in_bytes
  return Compiled(
    parameter_bytes=sharded_bytes(state.params),
    optimizer_bytes=sharded_bytes(state.opt_state),
    temporary_bytes=memory.temp_size_in_bytes,
    peak_bytes=peak,
    collectives=collectives(compiled.as_text(), dict(mesh.shape)),
    compile_seconds=seconds,
  )
