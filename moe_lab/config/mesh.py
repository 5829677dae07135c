"""How a run is spread over devices."""

import dataclasses

from moe_lab.config.checks import check_range
from moe_lab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh's axes; their product is the number of devices.

  Devices along `data`, `fsdp` and `expert` read sequences of their own; those along `sequence` share them, and those
  along `model` share every token.
  """

  data: int = -1  # copies of the model; -1: as many as the other axes leave devices for
  fsdp: int = 1  # devices that share a copy's parameters and optimizer state, fetching them layer by layer (ZeRO-3)
  expert: int = 1  # devices that share the experts; tokens travel to them and back
  sequence: int = 1  # devices that each have a stretch of a sequence
  model: int = 1  # devices that share heads, hidden widths and the vocabulary (Megatron, arXiv 1909.08053)
  slices: int = 1  # pods that only a slower network joins; copies of the model are spread over them, nothing else is

  def __post_init__(self):
    if self.data != -1:
      check_range("mesh.data", self.data, 1)
    for name in ("fsdp", "expert", "sequence", "model", "slices"):
      check_range(f"mesh.{name}", getattr(self, name), 1)

  @property
  def num_devices(self) -> int:
    """The product of all axes, where `data` is given."""
    return self.data * self.fsdp * self.expert * self.sequence * self.model

  def sizes(self, num_devices: int) -> dict[str, int]:
    """Returns axis -> its size, on so many devices.

    Raises:
      ConfigError: the sizes do not multiply to them.
    """
    fixed = self.fsdp * self.expert * self.sequence * self.model
    data = num_devices // fixed if self.data == -1 else self.data
    if data * fixed != num_devices:
      if self.data == -1:
        field, got = "mesh", f"fsdp * expert * sequence * model = {fixed}"
        raise ConfigError(field, got, f"a divisor of the number of devices, {num_devices}")
      wanted = f"{num_devices}, the number of devices, as the product of all axes; it is {data * fixed}"
      if num_devices % fixed == 0:
        wanted = f"{num_devices // fixed}, so that the axes multiply to the {num_devices} devices; or -1"
      raise ConfigError("mesh.data", self.data, wanted)
    if data % self.slices:
      raise ConfigError("mesh.slices", self.slices, f"a divisor of mesh.data = {data}")
    return {"data": data, "fsdp": self.fsdp, "expert": self.expert, "sequence": self.sequence, "model": self.model}
