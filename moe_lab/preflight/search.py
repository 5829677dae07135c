"""Which mesh? All that divide the model and the chips are ranked by arithmetic, and the best few are compiled."""

import dataclasses
import itertools
from collections.abc import Callable

from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError
from moe_lab.preflight.chips import Chip, chip_of
from moe_lab.preflight.estimate import Estimate, estimate, spreads_tokens, weights_of
from moe_lab.preflight.report import preflight
from moe_lab.preflight.topology import topology_devices

COMPILED = 3  # of the best by arithmetic
MARGIN = 1.25  # on bytes by arithmetic, which come out up to a fifth low
SHARED = ("fsdp", "expert", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh and what arithmetic says of it."""

  mesh: MeshConfig
  estimate: Estimate

  @property
  def flags(self) -> str:
    """How a command asks for it."""
    return " ".join(f"--config.mesh.{axis}={getattr(self.mesh, axis)}" for axis in SHARED)


def rank(fits: bool, seconds: float | None, network: float | None, held: float) -> tuple:
  """Returns what meshes are sorted by: those that fit first, then the step's time, then what it sends and holds."""
  never = float("inf")
  return not fits, never if seconds is None else seconds, never if network is None else network, held


def legal_meshes(config: Config, chips: int) -> list[MeshConfig]:
  """Returns every mesh of so many chips that divides the model, the sequence and a micro-batch's tokens."""
  divisors = [n for n in range(1, chips + 1) if chips % n == 0]
  found = []
  for sizes in itertools.product(divisors, repeat=len(SHARED)):
    try:
      mesh = dataclasses.replace(config.mesh, data=-1, **dict(zip(SHARED, sizes, strict=True)))
      along = mesh.sizes(chips)
      dataclasses.replace(config, mesh=mesh)
    except ConfigError:
      continue
    if spreads_tokens(config, along):
      found.append(mesh)
  return found


def candidates(config: Config, chip: Chip, chips: int) -> list[Candidate]:
  """Returns the legal meshes, the best by arithmetic first.

  Raises:
    UserError: there is none.
  """
  weights = weights_of(config)
  found = [Candidate(mesh, estimate(config, weights, mesh.sizes(chips), chip)) for mesh in legal_meshes(config, chips)]
  if not found:
    raise UserError(f"no mesh of {chips} chips divides the model and a micro-batch's tokens: fewer or more chips?")

  def key(one: Candidate):
    bound, held = one.estimate.roofline, one.estimate.bytes_per_chip
    axes = sum(getattr(one.mesh, axis) > 1 for axis in SHARED)
    return *rank(MARGIN * held <= chip.memory_bytes, bound.seconds, bound.network, held), axes

  # Of those that arithmetic cannot tell apart, the one with the fewest axes stays.
  return list({key(one)[:-1]: one for one in sorted(found, key=key, reverse=True)}.values())[::-1]


def suggestion(config: Config, topology: str) -> str:
  """Returns the mesh that arithmetic finds best, as flags, and what it says of it."""
  chip = chip_of(topology)
  best = candidates(config, chip, len(topology_devices(topology, config.mesh.slices)))[0]
  bound, held = best.estimate.roofline, best.estimate.bytes_per_chip
  return f"{best.flags} (by arithmetic {held / 2**30:.1f} GiB a chip, {bound.seconds:.3g} s, {bound.share:.0%})"


def search(config: Config, topology: str, note: Callable[[str], None]) -> dict:
  """Compiles the training step on the best few meshes.

  Args:
    config: of the run; its mesh is not looked at, but for `slices`.
    topology: as TPUs are sold.
    note: hears how far it is.

  Returns:
    The result of the best, with "suggestion", the flags of its mesh, and "search": the number of legal meshes, and of
    those compiled the flags, bytes and seconds, estimated and compiled, the best first.

  Raises:
    UserError: no compiler for TPU, no such topology or chip, or no mesh for so many chips.
  """
  chip, chips = chip_of(topology), len(topology_devices(topology, config.mesh.slices))
  ranked = candidates(config, chip, chips)
  note(f"{len(ranked)} meshes divide {chips} chips; compiling {min(COMPILED, len(ranked))}")
  results = []
  for number, one in enumerate(ranked[:COMPILED], 1):
    note(f"{number}: {one.flags}, by arithmetic {one.estimate.bytes_per_chip / 2**30:.1f} GiB a chip")
    result = preflight(dataclasses.replace(config, mesh=one.mesh), topology)
    note(f"   the compiler plans {result['bytes_per_chip'] / 2**30:.1f} GiB")
    results.append((one, result))
  results.sort(key=lambda pair: rank(*(pair[1][key] for key in _RANKED)))
  listed = [
    {
      "flags": one.flags,
      "estimated_bytes": one.estimate.bytes_per_chip,
      "estimated_seconds": one.estimate.roofline.seconds,
      **{key: result[key] for key in (*_RANKED, "roofline_share", "binds")},
    }
    for one, result in results
  ]
  best, result = results[0]
  return result | {"suggestion": best.flags, "search": {"legal": len(ranked), "compiled": listed}}


_RANKED = ("fits", "step_seconds", "network_seconds", "bytes_per_chip")
