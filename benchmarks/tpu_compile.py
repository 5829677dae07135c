"""Compiles a training step for TPUs that are not there, and reads off memory and communication.

    python -m experiments.benchmark tpu_compile

Needs libtpu, which holds the compiler, and no TPU.
"""

import collections
import itertools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from benchmarks import results
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.preflight.compile import train_step_inputs
from moe_lab.preflight.topology import topology_devices
from moe_lab.sharding.mesh import make_mesh
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.step import make_train_step

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1")
MESHES = MeshConfig(data=1), MeshConfig(data=1, expert=4)
CONFIG = Config(
  model=ModelConfig(
    dim=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=16, expert_dim=512, dtype="bfloat16"
  ),
  routing=RoutingConfig(method="topk", k=2),
  data=DataConfig(vocab_size=8192, seq_len=512),
  train=TrainConfig(batch_size=8),
)

_COLLECTIVES = (
  "all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast"
)
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({_COLLECTIVES})(?:-start)?\(", re.MULTILINE)
_LAYOUT = re.compile(r"\{[^}]*\}|/\*[^*]*\*/")
_DIMENSIONS = re.compile(r"\w+\[([\d,]*)\]")


def topology_mesh(topology: str, config: MeshConfig) -> Mesh:
  """Returns a mesh of a topology's first chips, as many as the axes multiply to."""
  return make_mesh(config, topology_devices(topology)[: config.num_devices])


def _collectives(hlo: str) -> list[dict]:
  """Returns the collectives of a program: opcode, shape and how often it is written there."""
  count = collections.Counter((opcode, _LAYOUT.sub("", shape)) for shape, opcode in _COLLECTIVE.findall(hlo))
  return [{"opcode": opcode, "shape": shape, "count": n} for (opcode, shape), n in sorted(count.items())]


def _largest(shape: str) -> int:
  """Elements of the largest array of an HLO shape, which may be a tuple."""
  return max(math.prod(int(n) for n in dims.split(",") if n) for dims in _DIMENSIONS.findall(shape))


def compile_for(topology: str, config: Config, mesh_config: MeshConfig) -> dict:
  """Compiles the training step of `config` for the first chips of a topology.

  Args:
    topology: as TPUs are sold: "v5e:2x2".
    config: of the run.
    mesh_config: how many chips share what.

  Returns:
    topology, chips, seconds of compilation, bytes a chip by kind, `collectives`, and `gathers_all_experts`: whether
    any all-gather makes an array as large as one matrix of all experts of a layer, or larger.
  """
  mesh = topology_mesh(topology, mesh_config)
  optimizer = make_optimizer(config.train)
  lowered = make_train_step(config, Transformer(config, mesh), optimizer).lower(*train_step_inputs(config, mesh))
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory, collectives = compiled.memory_analysis(), _collectives(compiled.as_text())
  all_experts = config.model.num_experts * config.model.dim * config.model.expert_dim
  return {
    "topology": topology,
    "chips": mesh.size,
    "compile_seconds": seconds,
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
    "collectives": collectives,
    "gathers_all_experts": any(
      c["opcode"] == "all-gather" and _largest(c["shape"]) >= all_experts for c in collectives
    ),
  }


def report(note: Callable[[str], None]) -> list[dict]:
  """Returns `compile_for` of each topology, on one chip and on four that share experts; `note` hears how far it is."""
  found = []
  for topology, mesh in itertools.product(TOPOLOGIES, MESHES):
    note(f"compiling for {mesh.num_devices} of {topology}")
    found.append(compile_for(topology, CONFIG, mesh))
  return found


def save(folder: Path, compiled: list[dict], machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md and .json; returns the .md."""
  rows = [("topology", "chips", "compile", "arguments", "temporaries", "gathers all experts", "collectives")]
  for one in compiled:
    count = collections.Counter()
    for collective in one["collectives"]:
      count[collective["opcode"]] += collective["count"]
    rows.append(
      (
        one["topology"],
        str(one["chips"]),
        f"{one['compile_seconds']:.0f} s",
        f"{one['argument_bytes'] / 2**20:,.0f} MiB",
        f"{one['temporary_bytes'] / 2**20:,.0f} MiB",
        "yes" if one["gathers_all_experts"] else "no",
        ", ".join(f"{n} {opcode}" for opcode, n in sorted(count.items())) or "none",
      )
    )
  words = f"Memory is a chip's. Compiled on {results.in_words(machine)}"
  text = f"# tpu_compile\n\n    {command}\n\n{words}\n\n{results.markdown(rows)}\n"
  return results.write(folder, "tpu_compile", machine, text, {"machine": machine, "results": compiled})
