"""Checks that want several devices: in a process of their own, since jax counts its devices once."""

import os
import subprocess
import sys
from pathlib import Path


def run(checks: str) -> None:
  """Runs a script on eight CPU devices; it ends by printing "all equal"."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  root = Path(__file__).parents[2]
  done = subprocess.run([sys.executable, "-c", checks], cwd=root, env=environment, capture_output=True, text=True)
  assert done.stdout.strip() == "all equal", done.stderr[-4000:]
