"""What TPU chips can do, as their maker publishes it (cloud.google.com/tpu/docs, "System architecture")."""

import dataclasses

from moe_lab.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip.

  Attributes:
    memory_bytes: of its HBM.
    flops: peak bfloat16 FLOP/s.
    memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s that it sends to others of its slice, all links together.
    slice_bandwidth: bytes/s that it sends to other slices, its share of the host's. (v4's is not published: v5p's.)
  """

  memory_bytes: float
  flops: float
  memory_bandwidth: float
  link_bandwidth: float
  slice_bandwidth: float


CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1228e9, 300e9, 6.25e9),
  "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9, 3.125e9),
  "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9, 6.25e9),
  "v6e": Chip(32 * 2**30, 918e12, 1640e9, 448e9, 12.5e9),
}


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology such as "v5p:4x4x8".

  Raises:
    UserError: its kind is not known.
  """
  kind = topology.partition(":")[0]
  if kind not in CHIPS:
    raise UserError(f"--topology={topology}: wanted a chip of {', '.join(CHIPS)}{did_you_mean(kind, CHIPS)}")
  return CHIPS[kind]
