"""Compiles forward and backward passes over 131,072 tokens for TPUs that are not there, and looks for L x L arrays.

    python -m experiments.benchmark tpu_long_context

Of `configs/medium_50b.py`: one layer's attention on one chip and spread over 64, and the whole model's loss and
gradients on 128, which share the experts and one sequence's tokens. Needs libtpu, which holds the compiler, and no
TPU; nothing is run, so it tells memory and not speed.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import results
from benchmarks.tpu_compile import topology_mesh
from configs import medium_50b
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.resolve import resolve
from moe_lab.config.schema import Config
from moe_lab.nn.attention import layer_slopes, layer_windows
from moe_lab.nn.transformer import Transformer
from moe_lab.sharding.rules import state_shardings, token_spec
from moe_lab.sharding.sequence import spread_attention
from moe_lab.train.losses import compute_loss
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.types import Batch

CASES = (
  ("attention", "v5e:2x2", MeshConfig(data=1)),
  ("attention", "v5p:2x2x1", MeshConfig(data=1)),
  ("attention", "v5p:4x4x4", MeshConfig(data=8, expert=8)),
  ("model", "v5p:4x4x8", MeshConfig(data=8, expert=16)),
)
_ARRAY = re.compile(r"\b(?:pred|[suf]\d+|bf16|f8\w+)\[([\d,]+)\]")


def arrays(hlo: str) -> set[tuple[int, ...]]:
  """Returns the shapes of all arrays that a program's text names."""
  return {tuple(int(n) for n in dims.split(",")) for dims in _ARRAY.findall(hlo)}


def squares(shapes: set[tuple[int, ...]], queries: int, keys: int) -> list[tuple[int, ...]]:
  """Returns the shapes that have an axis for every key and one more for every query of a device."""
  found = []
  for shape in shapes:
    low, high = sorted(shape)[-2:] if len(shape) > 1 else (0, 0)
    if high >= keys and (low >= keys or queries in sorted(shape)[:-1]):
      found.append(shape)
  return sorted(found)


def attention_step(config: Config, mesh: Mesh):
  """Returns one layer's attention, forward and backward, and its inputs: one sequence, in the activations' type."""
  model, length = config.model, config.data.seq_len
  sharding = NamedSharding(mesh, token_spec(mesh, 1, length))

  def shape(heads: int):
    return jax.ShapeDtypeStruct((1, length, heads, model.head_dim), model.dtype, sharding=sharding)

  def step(q_BLNH, k_BLMH, v_BLMH, segment_BL, d_out_BLNH):
    def run(q_BLNH, k_BLMH, v_BLMH):
      slope_M, window_M = jnp.asarray(layer_slopes(config.model)), layer_windows(config.model)
      return spread_attention(q_BLNH, k_BLMH, v_BLMH, slope_M, segment_BL, mesh, window_M=window_M)

    out_BLNH, backward = jax.vjp(run, q_BLNH, k_BLMH, v_BLMH)
    return out_BLNH, backward(d_out_BLNH)

  q, k = shape(model.num_heads), shape(model.num_kv_heads)
  return step, (q, k, k, jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding), q)


def model_step(config: Config, mesh: Mesh):
  """Returns the training loss and its gradients, as the optimizer would take them, and its inputs: one sequence."""
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1, accumulate=1))
  model, optimizer = Transformer(config, mesh), make_optimizer(config.train)
  state = jax.eval_shape(lambda: initial_state(config, optimizer))._replace(opt_state=())
  rows = jax.ShapeDtypeStruct((1, config.data.seq_len + 1), jnp.int32)

  def step(state, batch):
    def loss(params):
      return compute_loss(params, state, batch, jax.random.key(0), config, model)

    return jax.grad(loss, has_aux=True)(state.params)

  shardings = state_shardings(state, mesh), Batch(*[NamedSharding(mesh, P())] * 3)
  inputs = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    (state, Batch(rows, rows, rows)),
    shardings,
  )
  return step, inputs


def compile_for(what: str, topology: str, mesh_config: MeshConfig, config: Config) -> dict:
  """Compiles a forward and a backward pass over one sequence.

  Args:
    what: attention | model.
    topology: as TPUs are sold: "v5p:4x4x8".
    mesh_config: how many chips share what.
    config: whose `data.seq_len` is L.

  Returns:
    what, topology, chips, length, seconds of compilation, bytes a chip by kind, the largest array a chip holds;
    `large`: the arrays with at least as many elements as a chip's queries times L, as one head's logits would have;
    `squares`: those with an axis of at least L and another of at least L or of exactly a chip's queries, and of
    attention, which has no other large ones, all of `large`.
  """
  mesh, length = topology_mesh(topology, mesh_config), config.data.seq_len
  step, inputs = {"attention": attention_step, "model": model_step}[what](config, mesh)
  lowered = jax.jit(step).lower(*inputs)
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory, shapes = compiled.memory_analysis(), arrays(compiled.as_text())
  found = squares(shapes, length // mesh.size, length)
  large = sorted((shape for shape in shapes if math.prod(shape) >= length * length // mesh.size), key=math.prod)
  if what == "attention":
    found = sorted({*found, *large})
  return {
    "what": what,
    "topology": topology,
    "chips": mesh.size,
    "length": length,
    "compile_seconds": seconds,
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
    "largest_array": max(shapes, key=math.prod),
    "large": large,
    "squares": found,
  }


def report(note: Callable[[str], None]) -> list[dict]:
  """Returns `compile_for` of each case, at the reference system's length; `note` hears of progress."""
  found = []
  for what, topology, mesh in CASES:
    note(f"compiling the {what} for {mesh.num_devices} of {topology}")
    found.append(compile_for(what, topology, mesh, resolve(medium_50b.get_config())))
  return found


def save(folder: Path, compiled: list[dict], machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md and .json; returns the .md."""
  head = "what", "topology", "chips", "compile", "arguments", "outputs", "temporaries", "peak", "largest array", "L x L"
  rows = [head]
  for one in compiled:
    sizes = (f"{one[kind] / 2**20:,.0f} MiB" for kind in ("argument_bytes", "output_bytes", "temporary_bytes"))
    peak = f"{one['peak_bytes'] / 2**20:,.0f} MiB" if one["peak_bytes"] else "-"
    largest, found = "x".join(str(n) for n in one["largest_array"]), len(one["squares"])
    seconds = f"{one['compile_seconds']:.0f} s"
    rows.append((one["what"], one["topology"], str(one["chips"]), seconds, *sizes, peak, largest, str(found or "none")))
  words = (
    f"Forward and backward over {compiled[0]['length']:,} tokens, of configs/medium_50b.py; "
    f"memory and arrays are a chip's. Compiled, not run, on {results.in_words(machine)}"
  )
  text = f"# tpu_long_context\n\n    {command}\n\n{words}\n\n{results.markdown(rows)}\n"
  return results.write(folder, "tpu_long_context", machine, text, {"machine": machine, "results": compiled})
