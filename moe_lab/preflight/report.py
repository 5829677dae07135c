"""What a preflight says: does it fit, what binds, and the numbers behind."""

import collections
import math
import resource

import jax

from moe_lab.config.schema import Config
from moe_lab.preflight.chips import chip_of
from moe_lab.preflight.compile import compile_train_step
from moe_lab.preflight.roofline import bytes_sent, roofline
from moe_lab.preflight.topology import topology_devices
from moe_lab.sharding.mesh import make_mesh
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state


def parameter_counts(config: Config) -> tuple[int, int]:
  """Returns the parameters, and those that a token with the most experts takes part of."""
  params = jax.eval_shape(lambda: initial_state(config, make_optimizer(config.train))).params
  sizes = collections.Counter()
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    sizes["experts" if path[-1].key.endswith(("_EDF", "_EFD")) else "rest"] += math.prod(leaf.shape)
  total = sizes["experts"] + sizes["rest"]
  return total, sizes["rest"] + sizes["experts"] * config.routing.slots // config.model.num_experts


def preflight(config: Config, topology: str) -> dict:
  """Compiles `config`'s training step for a TPU topology.

  Returns:
    fits, bytes_per_chip, chip_bytes, params_total, params_active (at most), flops_per_token, collective_bytes
    (a chip's, by opcode and axes), step_seconds, and what they are made of.

  Raises:
    UserError: no compiler for TPU, no such topology or chip, or a mesh that it has not the chips for.
  """
  chip, devices = chip_of(topology), topology_devices(topology)
  mesh = make_mesh(config.mesh, devices)
  compiled = compile_train_step(config, mesh)
  bound = roofline(config, compiled, chip, len(devices))
  total, active = parameter_counts(config)
  sent = collections.Counter()
  for collective in compiled.collectives:
    sent[f"{collective.opcode} over {'+'.join(collective.axes) or 'nothing'}"] += bytes_sent(collective, config)
  return {
    "fits": compiled.peak_bytes <= chip.memory_bytes,
    "bytes_per_chip": compiled.peak_bytes,
    "chip_bytes": chip.memory_bytes,
    "parameter_bytes": compiled.parameter_bytes,
    "optimizer_bytes": compiled.optimizer_bytes,
    "temporary_bytes": compiled.temporary_bytes,
    "params_total": total,
    "params_active": active,
    "flops_per_token": bound.flops_per_token,
    "collective_bytes": dict(sorted(sent.items(), key=lambda item: -item[1])),
    "step_seconds": bound.seconds,
    "compute_seconds": bound.compute,
    "memory_seconds": bound.memory,
    "network_seconds": bound.network,
    "binds": bound.binds,
    "roofline_share": bound.share,
    "tokens_per_step": config.train.batch_size * config.data.seq_len,
    "topology": topology,
    "chips": len(devices),
    "mesh": dict(mesh.shape),
    "dispatch": "dropless: buffers for the worst case" if config.model.dispatch != "capacity" else "capacity",
    "compile_seconds": compiled.compile_seconds,
    "compile_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this machine's memory
  }


def table(result: dict) -> str:
  """Returns the result in lines for people."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "nothing shared"
  over = result["bytes_per_chip"] - result["chip_bytes"]
  verdict = "fits" if result["fits"] else f"does not fit, {_bytes(over)} too much"
  rows = [
    ("topology", f"{result['topology']}, {result['chips']} chips: {mesh}"),
    ("parameters", f"{_count(result['params_total'])}, at most {_count(result['params_active'])} active"),
    ("a chip holds", f"{_bytes(result['bytes_per_chip'])} of {_bytes(result['chip_bytes'])}: {verdict}"),
    ("  parameters", _bytes(result["parameter_bytes"])),
    ("  optimizer", _bytes(result["optimizer_bytes"])),
    ("  temporaries", f"{_bytes(result['temporary_bytes'])} ({result['dispatch']})"),
    ("tokens a step", f"{result['tokens_per_step']:,}"),
    ("FLOPs a token", f"{_count(result['flops_per_token'])}, in training"),
    ("a step takes", f"{_seconds(result['step_seconds'])} at least, by {result['binds']}"),
    *((f"  {part}", _seconds(result[f"{part}_seconds"])) for part in ("compute", "memory", "network")),
    ("roofline share", f"{result['roofline_share']:.0%} of the chips' peak"),
    ("a chip sends", f"{_bytes(sum(result['collective_bytes'].values()))} a step"),
    *((f"  {name}", _bytes(sent)) for name, sent in result["collective_bytes"].items()),
    (
      "compiled in",
      f"{_seconds(result['compile_seconds'])} and {_bytes(result['compile_bytes'])} of this machine's memory",
    ),
  ]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _bytes(n: float) -> str:
  return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _count(n: float) -> str:
  return f"{n / 1e9:,.1f} G" if n >= 1e9 else f"{n / 1e6:,.1f} M"


def _seconds(n: float) -> str:
  return f"{n:,.1f} s" if n >= 1 else f"{n * 1e3:,.2f} ms"
