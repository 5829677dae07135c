"""What a result was measured on."""

import importlib.metadata
import os
import platform
import subprocess


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
