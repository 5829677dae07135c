"""Writes requirements.lock: what pip would install today for each Python that we support.

    make lock        # or: python tools/lock.py python3.11 python3.12 > requirements.lock

pip resolves for the interpreter it runs under only, so each one is asked, in a
throw-away environment, oldest first, and lines on which they differ get a marker.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = """\
# The exact versions that `make env` installs. Written by `make lock`; do not edit.
"""


def versions(python: str) -> tuple[str, dict[str, str]]:
  """Returns the interpreter's version, "3.11", and package -> version of the package with its dev extra."""
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run([python, "-m", "venv", folder], check=True)
    venv = Path(folder)
    report = venv / "report.json"
    # setuptools is what builds the editable install, with build isolation off so that it is locked too.
    command = [
      venv / "bin/python",
      "-m",
      "pip",
      "install",
      "--quiet",
      "--dry-run",
      "--ignore-installed",
      "--report",
      report,
      ".[dev]",
      "setuptools",
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = json.loads(report.read_text())
  names = {item["metadata"]["name"]: item["metadata"]["version"] for item in found["install"]}
  return found["environment"]["python_version"], {name: v for name, v in names.items() if name != "moe_lab"}


def merged(by_python: dict[str, dict[str, str]]) -> list[str]:
  """Returns the lines of the lock, sorted by name."""
  lines = []
  for name in sorted({name for found in by_python.values() for name in found}, key=str.lower):
    where = {}  # version -> Pythons that take it
    for python, found in by_python.items():
      if name in found:
        where.setdefault(found[name], []).append(python)
    for version, pythons in where.items():
      # A Python newer than those asked takes what the newest of them takes.
      newest = list(by_python)[-1]
      marker = " or ".join(f'python_version {">=" if python == newest else "=="} "{python}"' for python in pythons)
      lines.append(f"{name}=={version}" + ("" if len(pythons) == len(by_python) else f" ; {marker}"))
  return lines


if __name__ == "__main__":
  print(HEADER + "\n".join(merged(dict(versions(python) for python in sys.argv[1:]))))
