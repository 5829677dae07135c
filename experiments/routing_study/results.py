"""What a study leaves: its numbers as JSON, its page, and the tables that a terminal shows."""

from collections.abc import Sequence
from pathlib import Path

from experiments.routing_study.measure import OWN
from moe_lab.errors import UserError
from moe_lab.io.files import dump_json, write_text
from moe_lab.report.numbers import aligned, number, plus_minus, scaled
from moe_lab.report.study_page import study_page


def save(workdir: Path, study: dict) -> None:
  """Writes WORKDIR/study-SPLIT.json and .html; what was there is replaced whole."""
  path = workdir / f"study-{study['split']}.json"
  try:
    write_text(path, dump_json(study, indent=1) + "\n")
    write_text(path.with_suffix(".html"), study_page(study))
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def summary(study: dict) -> dict:
  """Returns the program's result: what was compared, what was won, where the rest is."""
  ours = list(dict.fromkeys((entry["corpus"], entry["arm"]) for entry in study["comparisons"]))
  wins = {}
  for corpus, arm in ours:
    same = [entry for entry in study["comparisons"] if (entry["corpus"], entry["arm"]) == (corpus, arm)]
    entries = [entry for entry in same if not entry["bound"]]
    wins[f"{corpus}-{arm}"] = {
      "against_all": all(won(entry) for entry in entries),
      "controls": {entry["control"]: won(entry) for entry in entries},
    }
  return {
    "split": study["split"],
    "runs": len(study["runs"]),
    "failed": [run["name"] for run in study["runs"] if run["failed"]],
    "loss": {f"{row['corpus']}-{row['arm']}": row["loss"] for row in study["arms"]},
    "wins": wins,
    "alarms": sum(len(row["alarms"]) for row in study["arms"]),
    "page": f"study-{study['split']}.html",
  }


def won(entry: dict) -> bool:
  """Returns whether a comparison is a win: on all of our seeds, at equal FLOPs."""
  return entry["win"] and entry["matched"] and len(entry["by_seed"]) == entry["seeds"]


def line(record: dict) -> str:
  """Returns a run's own result in a few words."""
  if record["failed"]:
    return f"failed: {record['failed']}"
  own = record["rules"][OWN]
  return f"loss {own['loss']:.4f}, {own['mean_experts']:.2f} experts, trained in {record['training']['seconds']:.0f} s"


def text(study: dict) -> str:
  """Returns the tables as plain text."""
  parts = [aligned(_arm_lines(study["arms"]))]
  if study["comparisons"]:
    parts.append(aligned(_comparison_lines(study["comparisons"])))
  return "\n\n".join(parts)


def _arm_lines(rows: Sequence[dict]) -> list[list[str]]:
  lines = [["corpus", "arm", "seeds", "loss", "experts", "FLOPs/token", "training", "seconds", "max load", "dead", ""]]
  for row in rows:
    lines.append(
      [
        row["corpus"],
        row["arm"],
        str(len(row["seeds"])),
        plus_minus(row["loss"], 4),
        plus_minus(row["mean_experts"], 3),
        scaled(row["flops_per_token"]["mean"]),
        scaled(row["training_flops"]["mean"]),
        number(row["training_seconds"]["mean"], 0),
        number(max(row["max_over_mean_load"])),
        str(max(row["dead_experts"])),
        "ALARM" if row["alarms"] else "",
      ]
    )
  return lines


def _comparison_lines(comparisons: Sequence[dict]) -> list[list[str]]:
  lines = [["corpus", "ours", "control", "FLOPs, ours/control", "difference", "standard error", "win"]]
  for entry in comparisons:
    lines.append(
      [
        entry["corpus"],
        entry["arm"],
        entry["control"],
        number(entry["flops_ratio"], 3) + ("" if entry["matched"] else " UNEQUAL"),
        number(entry["mean"], 4),
        number(entry["standard_error"], 4),
        "bound" if entry["bound"] else "yes" if won(entry) else "no",
      ]
    )
  return lines
