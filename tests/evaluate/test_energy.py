"""Counters of energy against a made-up powercap tree and a made-up NVML."""

import importlib.util
import types
from pathlib import Path

import pytest

from moe_lab.evaluate import energy
from moe_lab.evaluate.energy import EnergyMeter, rapl_counters

TOP = 262_143_328_850


def zone(root: Path, name: str, kind: str, microjoules: int) -> Path:
  folder = root / name
  folder.mkdir()
  (folder / "name").write_text(f"{kind}\n")
  (folder / "max_energy_range_uj").write_text(f"{TOP}\n")
  (folder / "energy_uj").write_text(f"{microjoules}\n")
  return folder


def show(folder: Path, microjoules: int) -> None:
  (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_two_packages_and_memory_are_added_and_nothing_twice(tmp_path):
  first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
  core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
  dram = zone(tmp_path, "intel-rapl:1:0", "dram", 5_000_000)
  second = zone(tmp_path, "intel-rapl:1", "package-1", TOP - 1_000_000)
  board, again = zone(tmp_path, "intel-rapl:2", "psys", 0), zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
  meter = EnergyMeter("cpu", tmp_path)
  assert [counter.name for counter in meter.counters] == ["package-0", "package-1", "package-1 dram"]
  with meter.measure() as measured:
    show(first, 3_500_000)
    show(second, 2_000_000)  # round once: 1 J to the top, and 2 J from 0
    show(dram, 5_250_000)
    for other in (core, board, again):
      show(other, 9_000_000_000)
  assert measured.joules == pytest.approx({"package-0": 2.5, "package-1": 3.0, "package-1 dram": 0.25})
  assert measured.total == pytest.approx(5.75) and measured.reason == "" and measured.seconds > 0


def test_nothing_is_invented(tmp_path):
  for meter, words in (
    (EnergyMeter("cpu", tmp_path), "no RAPL package"),
    (EnergyMeter("cpu", tmp_path / "no_such"), "no RAPL package"),
    (EnergyMeter("tpu", tmp_path), "no counter is known for tpu"),
  ):
    with meter.measure() as measured:
      pass
    assert meter.counters == [] and words in meter.reason and measured.reason == meter.reason
    assert measured.joules is None and measured.total is None


def test_one_package_of_two_is_no_measurement(tmp_path):
  zone(tmp_path, "intel-rapl:0", "package-0", 0)
  (zone(tmp_path, "intel-rapl:1", "package-1", 0) / "energy_uj").unlink()
  with pytest.raises(OSError, match="intel-rapl:1/energy_uj: No such file"):
    rapl_counters(tmp_path)
  assert EnergyMeter("cpu", tmp_path).counters == []


def test_what_only_root_may_read_is_said(tmp_path, monkeypatch):
  zone(tmp_path, "intel-rapl:0", "package-0", 0)
  read = Path.read_text

  def refused(path, *args, **kwargs):
    if path.name == "energy_uj":
      raise PermissionError(13, "Permission denied")
    return read(path, *args, **kwargs)

  monkeypatch.setattr(Path, "read_text", refused)
  assert EnergyMeter("cpu", tmp_path).reason.endswith("intel-rapl:0/energy_uj: Permission denied")


def test_a_counter_that_goes_away_leaves_nothing(tmp_path):
  counted = zone(tmp_path, "intel-rapl:0", "package-0", 0)
  with EnergyMeter("cpu", tmp_path).measure() as measured:
    (counted / "energy_uj").write_text("")
  assert measured.joules is None and measured.reason


class FakeNvml(types.SimpleNamespace):
  """Counts millijoules of two GPUs; `broken` ones don't."""

  class NVMLError(Exception):
    pass

  def __init__(self, broken=False):
    super().__init__(shown={"0": 7_000, "1": 0, "GPU-5": 500}, broken=broken)

  def nvmlInit(self):  # noqa: N802
    pass

  def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
    if str(index) not in self.shown:
      raise self.NVMLError("Invalid Argument")
    return str(index)

  def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
    return uuid

  def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
    if self.broken:
      raise self.NVMLError("Not Supported")
    return self.shown[handle]


@pytest.mark.parametrize(
  "visible, handle, name", [(None, "0", "gpu0"), ("1,0", "1", "gpu1"), ("GPU-5", "GPU-5", "GPU-5")]
)
def test_the_gpu_that_jax_takes_first(tmp_path, monkeypatch, visible, handle, name):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  if visible:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  nvml = FakeNvml()
  meter = EnergyMeter("gpu", tmp_path, nvml)
  assert "no RAPL package" in meter.left_out and meter.reason == ""
  with meter.measure() as measured:
    nvml.shown[handle] += 12_500
  assert measured.joules == pytest.approx({name: 12.5})


def test_the_processors_are_added_to_the_gpu(tmp_path, monkeypatch):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  counted, nvml = zone(tmp_path, "intel-rapl:0", "package-0", 0), FakeNvml()
  meter = EnergyMeter("gpu", tmp_path, nvml)
  with meter.measure() as measured:
    show(counted, 250_000)
    nvml.shown["0"] += 1_000
  assert measured.total == pytest.approx(1.25) and meter.left_out == ""


def test_without_the_gpus_counter_the_processors_alone_are_no_measurement(tmp_path, monkeypatch):
  zone(tmp_path, "intel-rapl:0", "package-0", 0)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  assert EnergyMeter("gpu", tmp_path, FakeNvml(broken=True)).reason == "gpu0: Not Supported"
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
  assert EnergyMeter("gpu", tmp_path, FakeNvml()).reason == "NVML: Invalid Argument"
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  meter = EnergyMeter("gpu", tmp_path)
  assert meter.counters == [] and "pip install -e '.[gpu]'" in meter.reason


def test_here_there_is_a_figure_or_a_reason():
  meter = EnergyMeter("cpu")
  with meter.measure() as measured:
    sum(range(100_000))
  assert (measured.total is None) == bool(measured.reason) and energy.POWERCAP == Path("/sys/class/powercap")
  assert measured.total is None or measured.total >= 0
