"""Preflights of the presets, each in a process of its own: do they fit, what binds, and what does it take to know?

    python -m experiments.benchmark presets

Needs libtpu, which holds the compiler, and no TPU; minutes each.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from moe_lab.errors import require
from moe_lab.io.files import write_text

# Around the table in docs/scale.md.
BEGIN, END = "<!-- presets: by the command above -->", "<!-- end -->"

CASES = (  # configuration, topology, mesh
  ("configs/medium_50b.py:8k", "v5p:4x4x8", {"fsdp": 16, "expert": 8}),
  ("configs/medium_50b.py:128k", "v5p:4x8x8", {"fsdp": 32, "expert": 8}),
  ("configs/large_200b.py", "v5p:8x8x8", {"fsdp": 64, "expert": 8}),
  ("configs/baselines.py:llama3_70b", "v5p:4x4x8", {"fsdp": 128}),
  ("configs/baselines.py:phi3_medium", "v5p:4x4x4", {"fsdp": 64}),
  ("configs/baselines.py:mixtral_8x7b", "v5p:4x4x4", {"fsdp": 16, "expert": 4}),
  ("configs/baselines.py:deepseek_moe_16b", "v5p:4x4x4", {"fsdp": 8, "expert": 8}),
  ("configs/baselines.py:switch_base", "v5p:2x4x4", {"expert": 32}),
)


def preflight(config: str, topology: str, mesh: dict[str, int], fields: dict[str, int] | None = None) -> dict:
  """Returns the result of `experiments.preflight` and its "config", or an "error" in its place.

  Args:
    config: a file, with its argument.
    topology: as TPUs are sold.
    mesh: axis -> chips, of those that are not 1.
    fields: further ones of the configuration, by dotted name.

  Raises:
    UserError: the compiler is not installed, so that there is nothing to report.
  """
  require("libtpu", f"the preflight of {config}", "tpu")
  given = {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("fsdp", "expert")} | (fields or {})
  flags = [f"--config.{name}={value}" for name, value in given.items()]
  command = [sys.executable, "-m", "experiments.preflight", f"--config={config}", f"--topology={topology}", *flags]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    return {"config": config, "topology": topology, "error": done.stderr.strip().splitlines()[-1]}
  return {"config": config} | json.loads(done.stdout.splitlines()[-1])


def report(note: Callable[[str], None]) -> list[dict]:
  """Returns the preflight of each preset; `note` hears how far it is."""
  found = []
  for config, topology, mesh in CASES:
    note(f"compiling {config} for {topology}")
    found.append(preflight(config, topology, mesh))
    note(found[-1].get("error") or f"{found[-1]['bytes_per_chip'] / 2**30:.1f} GiB a chip")
  return found


def table(found: list[dict]) -> str:
  """Returns the preflights as a Markdown table."""
  rows = [
    ("configuration", "chips", "mesh", "parameters", "active", "a chip", "fits", "step", "binds", "share", "took")
  ]
  for one in found:
    name = one["config"].removeprefix("configs/")
    if "error" in one:
      rows.append((name, one["topology"], *["-"] * 8, one["error"]))
      continue
    known = one["step_seconds"] is not None
    tokens = f"{one['tokens_per_step'] / 2**20:.1f} M tokens"
    rows.append(
      (
        name,
        one["topology"],
        " x ".join(f"{axis} {size}" for axis, size in one["mesh"].items() if size > 1),
        f"{one['params_total'] / 1e9:.1f} B",
        f"{one['params_active'] / 1e9:.1f} B",
        f"{one['bytes_per_chip'] / 2**30:.1f} of {one['chip_bytes'] / 2**30:.0f} GiB",
        "yes" if one["fits"] else "no",
        f"{one['step_seconds']:.2f} s for {tokens}" if known else "-",
        one["binds"] if known else "memory",
        f"{one['roofline_share']:.0%}" if known else "-",
        f"{one['compile_seconds']:.0f} s, {one['compile_bytes'] / 2**30:.1f} GiB",
      )
    )
  return results.markdown(rows)


def save(folder: Path, found: list[dict], machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md and .json, and its table into docs/scale.md; returns the .md.

  The guide is that of the checkout that the folder, benchmarks/results, lies in; other folders have none.
  """
  words = (
    "What the compiler plans for a training step; nothing was run. A step's time is the least by the roofline of "
    f"moe_lab/preflight/roofline.py, and the share that of the chips' peak. Compiled on {results.in_words(machine)}"
  )
  text = f"# presets\n\n    {command}\n\n{words}\n\n{table(found)}\n"
  path = results.write(folder, "presets", machine, text, {"machine": machine, "results": found})
  guide = folder.absolute().parent.parent / "docs" / "scale.md"
  if guide.exists():
    write_text(guide, with_table(guide.read_text(), table(found)))
  return path


def with_table(text: str, new: str) -> str:
  """Returns the guide's text with another table between its marks."""
  before, _, rest = text.partition(f"{BEGIN}\n")
  _, _, after = rest.partition(END)
  return f"{before}{BEGIN}\n{new}\n{END}{after}" if rest else text
