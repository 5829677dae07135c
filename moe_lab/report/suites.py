"""What evaluation suites found, as parts of pages: quality against compute, experts by kind of query."""

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_lab.errors import UserError
from moe_lab.report.charts import Point, Series, line_chart
from moe_lab.report.numbers import is_number, mean, number, scaled
from moe_lab.report.page import escape, figure, note, table

_MOST_LINES = 8  # the page's line colours
_BAR = 7  # rem, of the kind with most experts


def read_suites(workdir: Path) -> list[dict]:
  """Returns the suites that a run was asked, the latest of each name: suite-NAME.json.

  Raises:
    UserError: a file cannot be read.
  """
  found = []
  for path in sorted(workdir.glob("suite-*.json")):
    try:
      suite = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise UserError(f"{path} cannot be read: {error}") from error
    if path.name == file_name(suite):  # others are of earlier checkpoints
      found.append(suite)
  return found


def measured(suite: Mapping) -> dict[str, dict]:
  """Returns the tasks of a suite that were asked."""
  return {name: task for name, task in suite["tasks"].items() if task["by_budget"]}


def task_curves(task: Mapping, key: str) -> list[Series]:
  """Returns a task's quality against a cost, a point a budget: alone, with passages, and what chance gives.

  Args:
    task: of a suite.
    key: mean_experts | flops_per_item.
  """
  rows = task["by_budget"]
  series = [Series("the model", _curve(rows, key), 1, "dots")]
  if all("retrieved" in row for row in rows):
    series.append(Series("with passages", _curve([row["retrieved"] for row in rows], key), 2, "dots"))
  chance, ends = rows[0]["chance"], [x for one in series for x, _ in one.points]
  if is_number(chance) and ends:
    series.append(Series("chance", [(min(ends), chance), (max(ends), chance)], 3, "dashed"))
  return series


def curves(suite: Mapping) -> str:
  """Returns a figure for each task: quality against experts, and with passages against FLOPs; a note for one budget."""
  body = ""
  for name, task in measured(suite).items():
    retrieved = any("retrieved" in row for row in task["by_budget"])
    axes = [("mean_experts", "experts per token, measured")]
    axes += [("flops_per_item", "FLOPs per item")] if retrieved else []
    for key, label in axes:
      # Chance alone is two points too, but no curve.
      series = task_curves(task, key) if len({row[key] for row in task["by_budget"]}) > 1 else []
      title = f"{name}: {task['metric']} against {label}"
      drawing = line_chart(series, title=title, x_label=label, y_label=task["metric"], include_zero=True)
      body += figure(drawing, f"{name}: {task['metric']}, a point a budget.")
  return f'<div class="pair">{body}</div>' if body else note("One budget: a number and no curve; --budgets=1,2,4.")


def suites_section(suites: Sequence[Mapping]) -> str:
  """Returns a run's suites, each with its curves, its table, and a link to its page."""
  parts = []
  for suite in suites:
    link = f'<a href="{escape(urllib.parse.quote(page_name(suite)))}">page</a>'
    of = f"suite {suite['suite']}, checkpoint of step {suite['step']}"
    drawn = curves(suite) if len(suite["budgets"]) > 1 else ""
    parts.append(f"<h3>{escape(of)} ({link})</h3>{drawn}{task_table(suite)}{kind_table(suite)}")
  return "".join(parts)


def file_name(suite: Mapping) -> str:
  """Returns the name of the file with a suite's record."""
  return f"suite-{suite['suite']}.json"


def page_name(suite: Mapping) -> str:
  """Returns the file name of a suite's page."""
  return f"suite-{suite['suite']}.html"


def task_table(suite: Mapping) -> str:
  """Returns a row for each task and budget, and another with passages."""
  head = [
    "task",
    "budget",
    "",
    "metric",
    "result",
    "95% interval",
    "chance",
    "items",
    "experts",
    "FLOPs/token",
    "FLOPs/item",
  ]
  rows = []
  for name, task in measured(suite).items():
    for entry in task["by_budget"]:
      for row, how in ((entry, "alone"), (entry.get("retrieved"), "with passages")):
        if row:
          rows.append([escape(name), number(entry["budget"]), how, escape(task["metric"]), *_results(row)])
  skipped = [note(f"{name}: skipped: {task['skipped']}") for name, task in suite["tasks"].items() if "skipped" in task]
  caption = (
    "The interval is Wilson's, of the items as drawn at random. Experts per token and layer; FLOPs of a forward pass."
  )
  if not any("retrieved" in entry for task in measured(suite).values() for entry in task["by_budget"]):
    head, rows = ([line[:2] + line[3:] for line in lines] for lines in ([head], rows))
    (head,) = head
    return table(head, rows, caption=caption, text_columns=3, sortable=True) + "".join(skipped)
  return table(head, rows, caption=caption, text_columns=4, sortable=True) + "".join(skipped)


def _results(row: Mapping) -> list[str]:
  low, high = row["interval"]
  return [
    number(row["value"], 3), f"{low:.3f} to {high:.3f}", number(row["chance"], 3), str(row["items"]),
    number(row["mean_experts"]), scaled(row["flops_per_token"]), scaled(row["flops_per_item"]),
  ]  # fmt: skip


def groups_section(groups: Sequence[Mapping]) -> str:
  """Returns a figure for each task of each suite that runs of a sweep were asked: a line a group of runs.

  A point is the mean over the runs of a group at one budget; groups with a single budget are in the table below only.

  Args:
    groups: of `groups_of`.
  """
  asked = (suite for group in groups for run in group["runs"] for suite in run["suites"])
  tasks = dict.fromkeys((suite["suite"], name) for suite in asked for name in measured(suite))
  body, rows = "", []
  for suite_name, name in tasks:
    series = []
    for colour, group in enumerate(groups[:_MOST_LINES], 1):
      points = _mean_points(group, suite_name, name)
      series.append(Series(group["name"], [(experts, value) for _, experts, value, _ in points], colour, "dots"))
      of = [escape(group["name"]), escape(suite_name), escape(name)]
      rows += [[*of, number(b), number(value, 3), number(experts), str(runs)] for b, experts, value, runs in points]
    label = "experts per token, measured"
    drawing = line_chart(series, title=f"{name} against {label}", x_label=label, y_label="result", include_zero=True)
    body += figure(drawing, f"{name} (suite {suite_name}): mean over the runs of a group, a point a budget.")
  if not rows:
    return ""
  head = ["group", "suite", "task", "budget", "result", "experts", "runs"]
  return f'<div class="pair">{body}</div>' + table(head, rows, text_columns=3, sortable=True)


def _mean_points(group: Mapping, suite_name: str, name: str) -> list[tuple[float, float, float, int]]:
  """Returns (budget, mean experts, mean result, runs) of a task, by budget."""
  by_budget: dict[float, list[Mapping]] = {}
  for run in group["runs"]:
    for suite in run["suites"]:
      if suite["suite"] == suite_name:
        for row in measured(suite).get(name, {"by_budget": []})["by_budget"]:
          by_budget.setdefault(row["budget"], []).append(row)
  return [
    (budget, mean([row["mean_experts"] for row in rows]), mean([row["value"] for row in rows]), len(rows))
    for budget, rows in sorted(by_budget.items())
  ]


def kind_table(suite: Mapping) -> str:
  """Returns a row for each kind of query and budget: experts on prompts and on answers, and the share that is right."""
  found = [(kind, entry["budget"], row) for entry in suite["by_kind"] for kind, row in entry.get("alone", {}).items()]
  if not found:
    return note("No task was asked.")
  most = max(row["answer_experts"] or 0 for _, _, row in found) or 1
  rows = []
  for kind, budget, row in sorted(found, key=lambda entry: entry[:2]):
    bar = f'<span class="bar" style="width:{(row["answer_experts"] or 0) / most * _BAR:.2f}rem"></span>'
    low, high = row["interval"]
    rows.append(
      [
        escape(kind), f'<span aria-hidden="true">{bar}</span>', number(budget), number(row["answer_experts"]),
        number(row["prompt_experts"]), number(row["value"], 3), f"{low:.3f} to {high:.3f}", number(row["chance"], 3),
        str(row["items"]),
      ]
    )  # fmt: skip
  head = [
    "kind of query",
    "",
    "budget",
    "experts, answer",
    "experts, prompt",
    "right",
    "95% interval",
    "chance",
    "items",
  ]
  caption = "Over all tasks. Bars: experts per token and layer on what predicts the answers."
  return table(head, rows, caption=caption, text_columns=2, sortable=True)


def difficulty_charts(suite: Mapping) -> str:
  """Returns experts on answers, and the share that is right, against the grade of difficulty; a line a kind."""
  entry = _own_budget(suite)
  graded = {kind: _by_grade(row["by_difficulty"]) for kind, row in entry.get("alone", {}).items()}
  graded = {kind: rows for kind, rows in graded.items() if len(rows) > 1}
  shown = list(graded.items())[:_MOST_LINES]
  body = ""
  for key, label in (("answer_experts", "experts per token, answers"), ("value", "right")):
    series = [
      Series(kind, [(grade, row[key]) for grade, row in rows], colour, "dots")
      for colour, (kind, rows) in enumerate(shown, 1)
    ]
    if key == "value":
      series += [
        Series(f"{kind}, chance", [(grade, row["chance"]) for grade, row in rows], colour, "dashed")
        for colour, (kind, rows) in enumerate(shown, 1)
        if all(is_number(row["chance"]) for _, row in rows)
      ]
    title = f"{label} against the grade of difficulty"
    drawing = line_chart(series, title=title, x_label="grade of difficulty", y_label=label, include_zero=True)
    body += figure(drawing, f"{label.capitalize()}, budget {number(entry.get('budget'))}.")
  return f'<div class="pair">{body}</div>' if body else note("No items of several grades of difficulty.")


def _own_budget(suite: Mapping) -> Mapping:
  """Returns the entry of the budget that is nearest to the run's own."""
  return min(suite["by_kind"], key=lambda entry: abs(entry["budget"] - suite["trained_budget"]), default={})


def _by_grade(rows: Mapping[str, Mapping]) -> list[tuple[float, Mapping]]:
  return sorted(((float(grade), row) for grade, row in rows.items() if grade.isdecimal()), key=lambda entry: entry[0])


def _curve(rows: Sequence[Mapping], key: str) -> list[Point]:
  return sorted((row[key], row["value"]) for row in rows if is_number(row[key]))
