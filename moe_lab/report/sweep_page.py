"""The page of a sweep: sweep.html, which compares its runs and opens offline."""

import html
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_lab.report.charts import Point, Series, line_chart
from moe_lab.report.numbers import is_number, mean
from moe_lab.report.page import escape, figure, note, page, table, write_page
from moe_lab.report.suites import groups_section
from moe_lab.report.sweep_runs import SEED, axes_of, best_first, group_table, groups_of, read_sweep, run_table

_MOST_CURVES = 8  # the page's line colours


def write_sweep_report(workdir: Path) -> Path:
  """Writes `workdir/sweep.html` from sweep.json and the runs' folders, and returns its path.

  Raises:
    UserError: there is no sweep, or its records cannot be read.
    RunError: the page cannot be written.
  """
  return write_page(workdir / "sweep.html", sweep_page(read_sweep(workdir), workdir.absolute().name))


def sweep_page(sweep: Mapping, name: str) -> str:
  """Returns the document.

  Args:
    sweep: what `read_sweep` returns.
    name: of the sweep, for the title.
  """
  runs = sweep["runs"]
  groups = best_first(groups_of(runs))
  axes = axes_of(runs)
  sections = [
    ("Means over seeds" if SEED in axes else "Best first", _means(groups, SEED in axes)),
    ("Learning curves", _curves(groups, SEED in axes)),
    *([("Evaluation suites", suites)] if (suites := groups_section(groups)) else []),
    ("All runs", _runs(runs, len(axes))),
    ("Failed runs", _failed(runs)),
    ("How it was made", _origin(sweep)),
  ]
  return page(f"moe_lab sweep: {name}", _head(sweep), sections)


def _head(sweep: Mapping) -> str:
  states = [run["state"] for run in sweep["runs"]]
  counts = [
    f"{states.count(state)} {state}" for state in ("finished", "failed", "started", "waiting") if state in states
  ]
  about = [sweep["sweep"], f"{len(states)} runs: {', '.join(counts)}", f"launched by {sweep['launcher']}"]
  return f'<p class="soft">{escape(" · ".join(about))}</p>'


def _means(groups: Sequence[dict], seeds: bool) -> str:
  if not groups:
    return note("No run is finished yet.")
  head, rows = group_table(groups)
  caption = "By validation loss, in nats per token: lower is better. A click on a title sorts."
  if seeds:
    caption = "Mean ± standard deviation over seeds. " + caption
  columns = len(axes_of(groups)) + 1
  return table(head, [list(map(escape, row)) for row in rows], caption=caption, text_columns=columns, sortable=True)


def _curves(groups: Sequence[dict], seeds: bool) -> str:
  shown = groups[:_MOST_CURVES]
  body = ""
  for key, label in (("tokens", "training tokens"), ("flops", "training compute, FLOPs")):
    series = [Series(group["name"], _curve(group, key), colour, "dots") for colour, group in enumerate(shown, 1)]
    title = f"Validation loss in nats per token against {label}"
    drawing = line_chart(series, title=title, x_label=label, y_label="validation loss, nats/token")
    body += figure(drawing, f"Against {label}{', mean over seeds' if seeds else ''}. Lower is better.")
  if not body:
    return note("No finished run was evaluated more than once while it trained.")
  left_out = len(groups) - len(shown)
  more = note(f"The best {len(shown)}; the table has the other {left_out}.") if left_out else ""
  return f'<div class="pair">{body}</div>{more}'


def _curve(group: dict, key: str) -> list[Point]:
  """Returns the validation loss over `key`, mean over seeds, where all seeds have been evaluated."""
  by_step: dict[int, list[Point]] = {}
  for run in group["runs"]:
    for record in run["evals"]:
      if is_number(record.get(key)) and is_number(record.get("val_loss")):
        by_step.setdefault(record["step"], []).append((record[key], record["val_loss"]))
  points = [points for _, points in sorted(by_step.items()) if len(points) == len(group["runs"])]
  return [(mean([x for x, _ in at]), mean([y for _, y in at])) for at in points]


def _runs(runs: Sequence[Mapping], axes: int) -> str:
  head, rows = run_table(runs)
  lines = []
  for run, row in zip(runs, rows, strict=True):
    link = f'<a href="{html.escape(urllib.parse.quote(run["name"]))}/report.html">page</a>'
    lines.append([*map(escape, row), link if run["state"] == "finished" else ""])
  caption = "In the order of the sweep. A click on a title sorts."
  return table([*head, "page"], lines, caption=caption, text_columns=axes + 1, sortable=True)


def _failed(runs: Sequence[Mapping]) -> str:
  rows = [[escape(run["name"]), escape(run["failed"]), escape(run["log"] or "")] for run in runs if run["failed"]]
  return table(["run", "why", "log"], rows, text_columns=3) if rows else note("None.")


def _origin(sweep: Mapping) -> str:
  rows = []
  for run in sweep["runs"]:
    fields = "<br>".join(f"<code>{escape(f'{k}={json.dumps(v)}')}</code>" for k, v in run["overrides"].items())
    rows.append([escape(run["name"]), fields])
  return (
    f"<p>Command <code>{escape(sweep['command'])}</code></p>"
    f"<details><summary>What each run sets</summary>{table(['run', 'fields'], rows, text_columns=2)}</details>"
  )
