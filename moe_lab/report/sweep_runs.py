"""The runs of a sweep side by side, from sweep.json and what the runs' own folders hold; and the table of a terminal.

sweep.json names the sweep, the command and the runs, in the sweep's order: each with its labels, the fields that it
sets and, where it failed, why. How far a run is, its folder says.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_lab.config.sweep import FOLDER
from moe_lab.errors import UserError, visible
from moe_lab.io.writers import read_metrics
from moe_lab.report.numbers import aligned, is_number, number, plus_minus, scaled
from moe_lab.report.suites import read_suites
from moe_lab.strict_json import parse

SEED = "seed"  # the axis whose options are repetitions of one thing
# Result key -> its column's title and how a number is written there.
KEYS = {
  "val_loss": ("validation loss", lambda value: number(value, 4)),
  "test_loss": ("test loss", lambda value: number(value, 4)),
  "val_bits_per_byte": ("bits/byte", lambda value: number(value, 4)),
  "budget": ("budget", number),
  "mean_experts": ("experts, training", number),
  "eval_mean_experts": ("experts, greedy", number),
  "tokens": ("tokens", scaled),
  "flops": ("training FLOPs", scaled),
  "tokens_per_second": ("tokens/s", scaled),
}
_MEANS = {"val_loss": 4, "test_loss": 4, "val_bits_per_byte": 4, "eval_mean_experts": 2}  # decimals


def read_sweep(workdir: Path) -> dict:
  """Returns what sweep.json holds, each of its runs with four more entries.

  "state": finished | failed | started | waiting. "result": what `train` returned, with the tokens and FLOPs that were
  spent; {} before the end. "evals": the eval records, by step. "suites": as `read_suites`.

  Raises:
    UserError: there is no sweep, or a file cannot be read.
  """
  sweep = _read(workdir / "sweep.json")
  for run in _runs(sweep, workdir):
    folder = workdir / run["name"]
    evals = [record for record in read_metrics(folder) if record.get("kind") == "eval"]
    result = {}
    if run["failed"]:
      run["state"] = "failed"
    elif (folder / "evaluation.json").is_file():
      run["state"] = "finished"
      spent = {key: evals[-1].get(key) for key in ("tokens", "flops")} if evals else {}
      result = _read(folder / "evaluation.json")["result"] | spent
    else:
      run["state"] = "started" if (folder / "config.json").is_file() else "waiting"
    run |= {"result": result, "evals": evals, "suites": read_suites(folder)}
  return sweep


def _runs(sweep: Mapping, workdir: Path) -> list[dict]:
  """Returns the runs that sweep.json names; UserError for one that is not in the sweep's folder."""
  runs = sweep.get("runs")
  if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
    raise UserError(f"{workdir / 'sweep.json'}: wanted a list of runs")
  for run in runs:
    if not isinstance(run.get("name"), str) or not FOLDER.fullmatch(run["name"]):
      raise UserError(f"{workdir / 'sweep.json'}: a run is called {run.get('name')!r}: wanted the name of a folder")
  return runs


def axes_of(runs: Sequence[Mapping]) -> list[str]:
  """Returns the names of the axes, in the order in which the runs have them."""
  return list(dict.fromkeys(axis for run in runs for axis in run["labels"]))


def groups_of(runs: Sequence[Mapping]) -> list[dict]:
  """Returns the finished runs put together over seeds.

  Returns:
    {"name", "labels", "runs", and for each of some result keys {"mean", "spread"} or None}; the spread is the standard
    deviation over seeds, None for one. In the order of the sweep.
  """
  found: dict[tuple, dict] = {}
  for run in runs:
    if run["state"] == "finished":
      labels = {axis: label for axis, label in run["labels"].items() if axis != SEED}
      entry = {"name": "-".join(labels.values()) or "all", "labels": labels, "runs": []}
      found.setdefault(tuple(labels.items()), entry)["runs"].append(run)
  for entry in found.values():
    for key in _MEANS:
      values = [run["result"][key] for run in entry["runs"] if is_number(run["result"].get(key))]
      spread = statistics.stdev(values) if len(values) > 1 else None
      entry[key] = {"mean": statistics.fmean(values), "spread": spread} if values else None
  return list(found.values())


def best_first(groups: Sequence[dict]) -> list[dict]:
  """Returns the groups by validation loss; those without one last."""
  return sorted(groups, key=lambda group: group["val_loss"]["mean"] if group["val_loss"] else float("inf"))


def group_table(groups: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
  """Returns titles and rows, plain text: a row a group, with its axes' labels, then the seeds and the means."""
  axes = axes_of(groups)
  keys = [key for key in _MEANS if any(group[key] for group in groups)]
  head = [*axes, "seeds", *(KEYS[key][0] for key in keys)]
  return head, [
    [
      *(group["labels"].get(axis, "") for axis in axes),
      ", ".join(run["labels"].get(SEED, "–") for run in group["runs"]),
      *(plus_minus(group[key], _MEANS[key]) for key in keys),
    ]
    for group in groups
  ]


def run_table(runs: Sequence[Mapping]) -> tuple[list[str], list[list[str]]]:
  """Returns titles and rows, plain text: a row a run, with its axes' labels, its state and its result."""
  axes = axes_of(runs)
  keys = [key for key in KEYS if any(is_number(run["result"].get(key)) for run in runs)]
  head = [*axes, "state", *(KEYS[key][0] for key in keys)]
  return head, [
    [
      *(run["labels"].get(axis, "") for axis in axes),
      run["state"],
      *(KEYS[key][1](run["result"].get(key)) for key in keys),
    ]
    for run in runs
  ]


def sweep_text(sweep: Mapping) -> str:
  """Returns the tables of the runs, and of their means where there are seeds, as plain text."""
  runs = sweep["runs"]
  parts = [_text(*run_table(runs))]
  if SEED in axes_of(runs) and (groups := groups_of(runs)):
    parts.append("mean ± standard deviation over seeds, best first\n" + _text(*group_table(best_first(groups))))
  return visible("\n\n".join(parts))  # labels come from a file


def _text(head: list[str], rows: list[list[str]]) -> str:
  return aligned([head, *rows])


def _read(path: Path) -> dict:
  try:
    found = parse(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"no sweep in {path.parent}: run one first (python -m experiments.sweep)") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  if not isinstance(found, dict):
    raise UserError(f"{path}: wanted an object")
  return found
