"""What a run is made of: code, versions, machine."""

import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path

import jax

import moe_lab

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str | None]:
  """Returns the version of Python and of every package that shapes a result; null where not installed."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  found["moe_lab"] = getattr(moe_lab, "__version__", None)
  return found


def code() -> dict[str, object]:
  """Returns {"git_hash", "git_dirty"} of the checkout that this package runs from; nulls outside a checkout."""
  package = Path(moe_lab.__file__).parent
  # An installed package may lie inside some other project's checkout, whose hash would say nothing.
  ours = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
  commit = _git(package, "rev-parse", "HEAD") if ours else None
  changes = _git(package, "status", "--porcelain", "--untracked-files=no") if commit else None
  return {"git_hash": commit, "git_dirty": None if changes is None else bool(changes)}


def machine() -> dict[str, object]:
  """Returns {"host", "processes", "devices"}; devices, of all processes, are {"platform", "kind", "count"} by kind."""
  counts: dict[tuple[str, str], int] = {}
  for device in jax.devices():
    key = (device.platform, device.device_kind)
    counts[key] = counts.get(key, 0) + 1
  devices = [{"platform": p, "kind": kind, "count": count} for (p, kind), count in counts.items()]
  return {"host": socket.gethostname(), "processes": jax.process_count(), "devices": devices}


def _git(folder: Path, *args: str) -> str | None:
  try:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None
