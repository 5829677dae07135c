"""What a preflight says: does it fit, what binds, and the numbers behind."""

import collections
import resource

from moe_lab.config.schema import Config
from moe_lab.preflight.chips import chip_of
from moe_lab.preflight.compile import compile_train_step
from moe_lab.preflight.roofline import bytes_sent, roofline, serving_roofline
from moe_lab.preflight.serving import Serving, compile_serving
from moe_lab.preflight.topology import topology_devices
from moe_lab.sharding.mesh import make_mesh
from moe_lab.train.state import abstract_state, parameter_counts


def preflight(config: Config, topology: str, serving: Serving | None = None) -> dict:
  """Compiles a program of `config` for a TPU topology.

  Args:
    config: of the run.
    topology: as TPUs are sold: "v5p:4x4x8".
    serving: what is served; None: the training step.

  Returns:
    fits, bytes_per_chip, chip_bytes, params_total, params_active (at most), flops_per_token, collective_bytes
    (a chip's, by opcode and axes), step_seconds, and what they are made of. Where the compiler ran out of memory,
    what it would have told of collectives and times is None.

  Raises:
    UserError: no compiler for TPU, no such topology or chip, a mesh that it has not the chips for, or slots or a chunk
      that the mesh does not divide.
  """
  chip, devices = chip_of(topology), topology_devices(topology, config.mesh.slices)
  mesh = make_mesh(config.mesh, devices)
  if serving:
    compiled = compile_serving(config, mesh, serving)
    bound, tokens = serving_roofline(config, compiled, serving, chip, len(devices)), serving.tokens
  else:
    compiled = compile_train_step(config, mesh)
    bound, tokens = roofline(config, compiled, chip, len(devices)), config.train.batch_size * config.data.seq_len
  total, active = parameter_counts(abstract_state(config).params, config, config.routing.slots)
  sent = collections.Counter()
  for collective in compiled.collectives:
    sent[f"{collective.opcode} over {'+'.join(collective.axes) or 'nothing'}"] += bytes_sent(collective, config)
  result = {
    "program": serving.program if serving else "train",
    "fits": compiled.peak_bytes <= chip.memory_bytes and not compiled.ran_out,
    "bytes_per_chip": compiled.peak_bytes,
    "chip_bytes": chip.memory_bytes,
    "parameter_bytes": compiled.parameter_bytes,
    "optimizer_bytes": compiled.optimizer_bytes,
    "cache_bytes": compiled.cache_bytes,
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
    "tokens_per_step": tokens,
    "topology": topology,
    "chips": len(devices),
    "mesh": dict(mesh.shape),
    "slices": config.mesh.slices,
    "dispatch": "dropless: buffers for the worst case" if config.model.dispatch != "capacity" else "capacity",
    "compile_seconds": compiled.compile_seconds,
    "compile_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this machine's memory
  }
  unknown = ("collective_bytes", "step_seconds", "network_seconds", "binds", "roofline_share")
  return result | dict.fromkeys(unknown) if compiled.ran_out else result


def table(result: dict) -> str:
  """Returns the result in lines for people."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "nothing shared"
  over, known = result["bytes_per_chip"] - result["chip_bytes"], result["step_seconds"] is not None
  verdict = "fits" if result["fits"] else f"does not fit, {_bytes(over)} too much"
  step = _STEPS[result["program"]]
  several = f"{result['slices']} slices of " if result["slices"] > 1 else ""
  rows = [
    ("topology", f"{several}{result['topology']}, {result['chips']} chips: {mesh}"),
    ("parameters", f"{_count(result['params_total'])}, at most {_count(result['params_active'])} active"),
    ("a chip holds", f"{_bytes(result['bytes_per_chip'])} of {_bytes(result['chip_bytes'])}: {verdict}"),
    ("  parameters", _bytes(result["parameter_bytes"])),
    *((f"  {part}", _bytes(held)) for part in ("optimizer", "cache") if (held := result[f"{part}_bytes"])),
  ]
  if result["temporary_bytes"] is not None:
    rows.append(("  temporaries", f"{_bytes(result['temporary_bytes'])} ({result['dispatch']})"))
  rows += [
    (f"tokens {step}", f"{result['tokens_per_step']:,}"),
    (
      "FLOPs a token",
      f"{_count(result['flops_per_token'])}, {'in training' if result['optimizer_bytes'] else 'forward'}",
    ),
  ]
  if known:
    rows += [
      (f"{step} takes", f"{_seconds(result['step_seconds'])} at least, by {result['binds']}"),
      *((f"  {part}", _seconds(result[f"{part}_seconds"])) for part in ("compute", "memory", "network")),
      ("roofline share", f"{result['roofline_share']:.0%} of the chips' peak"),
      ("a chip sends", f"{_bytes(sum(result['collective_bytes'].values()))} {step}"),
      *((f"  {name}", _bytes(sent)) for name, sent in result["collective_bytes"].items()),
    ]
  else:
    rows.append(("time, network", "not known: the compiler ran out of the chip's memory"))
  for number, one in enumerate(result.get("search", {}).get("compiled", ()), 1):
    planned = f"{_bytes(one['bytes_per_chip'])} (by arithmetic {_bytes(one['estimated_bytes'])})"
    time = f"{_seconds(one['step_seconds'])}, {one['roofline_share']:.0%}" if one["fits"] else "does not fit"
    rows.append((f"search, {number}", f"{one['flags']}: {planned}, {time}"))
  if "suggestion" in result:
    rows.append(("suggestion", result["suggestion"]))
  rows.append(
    (
      "compiled in",
      f"{_seconds(result['compile_seconds'])}; {_bytes(result['compile_bytes'])} of this machine's memory",
    )
  )
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


_STEPS = {"train": "a step", "decode": "a step", "prefill": "a chunk"}


def _bytes(n: float) -> str:
  return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _count(n: float) -> str:
  return f"{n / 1e9:,.1f} G" if n >= 1e9 else f"{n / 1e6:,.1f} M"


def _seconds(n: float) -> str:
  return f"{n:,.1f} s" if n >= 1 else f"{n * 1e3:,.2f} ms"
