"""What a result was measured on."""

import importlib.metadata
import os
import platform
import subprocess
import time


def describe() -> dict:
  """Returns processor, cores, memory, accelerator (None without one) and versions."""
  versions = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "libtpu", "flax", "torch", "transformers"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0)),
    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    "accelerator": accelerator(),
    "versions": versions,
  }


def accelerator() -> str | None:
  """Returns the name of the first GPU; asked of the driver, so that this process does not take its memory."""
  try:
    names = subprocess.run(
      ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return names.stdout.splitlines()[0]


def _processor() -> str:
  try:
    with open("/proc/cpuinfo") as lines:
      facts = dict(line.strip().split("\t: ", 1) for line in lines if "\t: " in line)
  except OSError:
    return platform.processor()
  wide = " with AVX-512" if "avx512f" in facts.get("flags", "") else ""
  return facts.get("model name", platform.processor()) + wide


def busy_share(seconds: float) -> float | None:
  """Sleeps, and returns the share of all cores' time that other programs took meanwhile; None without /proc."""
  before = _cpu_times()
  time.sleep(seconds)
  after = _cpu_times()
  if before is None or after is None:
    return None
  idle, total = (b - a for a, b in zip(before, after, strict=True))
  return 1 - idle / total if total else None


def _cpu_times() -> tuple[int, int] | None:
  """Returns the ticks that all cores together were idle, and all ticks."""
  try:
    with open("/proc/stat") as lines:
      ticks = list(map(int, lines.readline().split()[1:9]))
  except OSError:
    return None
  return ticks[3] + ticks[4], sum(ticks)  # idle, and waiting for disks
