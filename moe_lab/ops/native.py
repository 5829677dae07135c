"""Builds and registers the CPU kernels in `cpu/`, once a machine.

XLA on CPU runs products of a few hundred rows, and loops of them, far below
what the processor can do: a training step kept two cores 60% busy
(benchmarks/LOG.md). The experts and attention are therefore C++ called through
XLA's foreign function interface, on XLA's own threads. The C++ compiler that
the machine has builds them at first use; the library is kept in the cache.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from moe_lab.config.program import cache_dir
from moe_lab.errors import RunError

TARGETS = (
  "experts_forward",
  "experts_backward",
  "experts_forward_coded",
  "attention_forward",
  "attention_backward",
  "attention_step",
  "logits_step",
)
_SOURCES = Path(__file__).with_name("cpu")

log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
  """Returns whether the kernels can be called; says once in the log why not."""
  try:
    register()
  except RunError as error:
    log.warning("CPU kernels left out, XLA's take their place (slower): %s", error)
    return False
  return True


def used_here() -> bool:
  """Returns whether programs for the default device may call the kernels."""
  return jax.default_backend() == "cpu" and available()


@functools.cache
def register() -> None:
  """Makes the kernels known to XLA as moe_lab_NAME for each of `TARGETS`.

  Raises:
    RunError: there is no C++ compiler, or it failed.
  """
  library = ctypes.CDLL(str(_build()))
  for target in TARGETS:
    name = f"moe_lab_{target}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")


def call(target: str, shapes: Sequence[tuple[int, ...]], *arrays: jax.Array) -> list[jax.Array]:
  """Calls a kernel; they all compute in float32.

  Args:
    target: one of `TARGETS`; registered.
    shapes: of the results.
    arrays: the arguments; those of another floating type are cast.

  Returns:
    The results, float32.
  """
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  arrays = [a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
  return jax.ffi.ffi_call(f"moe_lab_{target}", results, vmap_method="sequential")(*arrays)


def _compiler() -> str:
  for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
    if path := shutil.which(name):
      return path
  raise RunError("no C++ compiler found; install one (Debian: apt-get install g++) or name it in $CXX")


def _processor() -> str:
  """Returns what tells processors apart for which code may not be exchanged."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _build() -> Path:
  """Returns the library's path, built if it is not in the cache."""
  compiler = _compiler()
  native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
  # No -ffast-math: it would take the rounding trick of `exp` apart.
  options = ["-std=c++20", "-O3", native, "-fno-math-errno", "-fPIC", "-shared", "-isystem", jax.ffi.include_dir()]
  version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
  key = hashlib.sha256("\0".join([*options, version, _processor(), jaxlib.__version__]).encode())
  for source in sorted(_SOURCES.iterdir()):
    key.update(source.read_bytes())
  path = cache_dir() / "native" / f"{key.hexdigest()[:32]}.so"
  if path.exists():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  log.info("building the CPU kernels with %s (some seconds, once)", compiler)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    made = Path(folder) / path.name
    command = [compiler, *options, *map(str, sorted(_SOURCES.glob("*.cc"))), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
      raise RunError(f"{compiler} failed: {first}")
    made.replace(path)  # at once, so that two programs may build at the same time
  return path
