"""Energy by the machine's own counters: RAPL of processors (Intel and AMD), NVML of NVIDIA's GPUs.

A counter is of a whole package or GPU, whoever uses it: on a shared machine it has the others' work in it, and at rest
it goes on counting. What cannot be read is not estimated.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

from moe_lab.errors import UserError, require

POWERCAP = Path("/sys/class/powercap")
NOT_MEASURABLE = "not measurable here"


class Counter(Protocol):
  """Something that counts joules.

  Attributes:
    name: such as "package-0" or "gpu0".
  """

  name: str

  def read(self) -> int:
    """Returns what it shows now, in units of its own. Raises OSError if it can't be read."""

  def joules(self, before: int, after: int) -> float:
    """Returns the energy between two readings."""


class Rapl(NamedTuple):
  """A zone of the kernel's powercap tree; it counts microjoules and begins at 0 again after `top`.

  A package takes at least minutes to come round: measure for less than that.
  """

  name: str
  zone: Path
  top: int

  def read(self) -> int:
    return int((self.zone / "energy_uj").read_text())

  def joules(self, before: int, after: int) -> float:
    return (after - before + (self.top if after < before else 0)) * 1e-6


class Gpu(NamedTuple):
  """A GPU; it counts millijoules since its driver was loaded."""

  name: str
  nvml: ModuleType
  handle: object

  def read(self) -> int:
    try:
      return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
    except self.nvml.NVMLError as error:
      raise OSError(f"{self.name}: {error}") from None

  def joules(self, before: int, after: int) -> float:
    return (after - before) * 1e-3


@dataclasses.dataclass
class Energy:
  """What a stretch of time took.

  Attributes:
    seconds: its length.
    joules: by the name of the counter; None where they could not be read, for `reason`.
  """

  seconds: float = 0.0
  joules: dict[str, float] | None = None
  reason: str = ""

  @property
  def total(self) -> float | None:
    """Joules of all counters together."""
    return None if self.joules is None else sum(self.joules.values())


class EnergyMeter:
  """The counters of what computes here.

  Attributes:
    counters: those that are read.
    reason: why there are none; "" where there are some.
    left_out: what else takes energy, and is not counted.
  """

  def __init__(self, platform: str, powercap: Path = POWERCAP, nvml: ModuleType | None = None):
    """Finds the counters.

    Args:
      platform: what computes: cpu | gpu | tpu, as in `jax.default_backend()`. A GPU's energy needs NVML, to which that
        of the processors is added where it can be read.
      powercap: the kernel's folder of them.
      nvml: the module `pynvml`; None: the installed one.
    """
    self.counters, self.reason, self.left_out = [], "", ""
    try:
      if platform == "cpu":
        self.counters = rapl_counters(powercap)
      elif platform == "gpu":
        self.counters = [_first_gpu(nvml)]
        try:
          self.counters += rapl_counters(powercap)
        except OSError as error:
          self.left_out = f"the processors: {error}"
      else:
        raise OSError(f"no counter is known for {platform}")
    except (OSError, ValueError, UserError) as error:
      self.reason = str(error)

  @contextlib.contextmanager
  def measure(self) -> Iterator[Energy]:
    """Yields what is filled in at the end."""
    energy, before = Energy(reason=self.reason), None
    if self.counters:
      before = self._read(energy)
    started = time.monotonic()
    yield energy
    energy.seconds = time.monotonic() - started
    after = before and self._read(energy)
    if after:
      energy.joules = {
        counter.name: counter.joules(*shown) for counter, *shown in zip(self.counters, before, after, strict=True)
      }

  def _read(self, energy: Energy) -> list[int] | None:
    try:
      return [counter.read() for counter in self.counters]
    except (OSError, ValueError) as error:
      energy.reason = str(error)
      return None


def rapl_counters(powercap: Path = POWERCAP) -> list[Rapl]:
  """Returns the counters of every processor package, and of memory where it has one of its own.

  "dram" is not part of its package's count; "core" and "uncore" are, and "psys" is of the whole board: these would
  count twice, as would the packages' second interface, intel-rapl-mmio (kernel, Documentation/power/powercap).

  Raises:
    OSError: there is none, or one can't be read: some packages of several are no measurement.
  """
  found = []
  for zone in sorted(powercap.glob("intel-rapl:*"), key=lambda zone: zone.name):  # AMD's are called so too
    name = _text(zone / "name")
    if zone.name.count(":") == 1 and name.startswith("package-"):
      found.append(_rapl(name, zone))
    elif zone.name.count(":") == 2 and name == "dram":
      package = _text(powercap / zone.name.rpartition(":")[0] / "name")
      found.append(_rapl(f"{package} dram", zone))
  if not found:
    raise OSError(f"no RAPL package under {powercap}")
  return found


def _rapl(name: str, zone: Path) -> Rapl:
  _text(zone / "energy_uj")  # only root may read it on most systems: told now
  return Rapl(name, zone, int(_text(zone / "max_energy_range_uj")))


def _text(path: Path) -> str:
  try:
    return path.read_text().strip()
  except OSError as error:
    raise OSError(f"{path}: {error.strerror}") from None


def _first_gpu(nvml: ModuleType | None) -> Gpu:
  """Returns the GPU that jax takes first.

  Raises:
    UserError: the package is missing.
    OSError: the driver does not answer, or this GPU does not count.
  """
  if nvml is None:
    require("pynvml", "a GPU's energy", "gpu")
    nvml = importlib.import_module("pynvml")
  first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
  try:
    nvml.nvmlInit()
    by_index = first.isdecimal()
    handle = nvml.nvmlDeviceGetHandleByIndex(int(first)) if by_index else nvml.nvmlDeviceGetHandleByUUID(first)
  except nvml.NVMLError as error:
    raise OSError(f"NVML: {error}") from None
  gpu = Gpu(f"gpu{first}" if by_index else first, nvml, handle)
  gpu.read()
  return gpu
