"""What a run's evaluation suite found, as files: suite-NAME.json, and suite-NAME.html, which opens offline."""

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from moe_lab.errors import RunError
from moe_lab.io.files import dump_json, write_text
from moe_lab.report.numbers import number, scaled
from moe_lab.report.page import escape, note, page, table, write_page
from moe_lab.report.suites import (
  curves,
  difficulty_charts,
  file_name,
  kind_table,
  measured,
  page_name,
  task_table,
)

_log = logging.getLogger(__name__)

# What was asked; what came of it is the same whenever that is.
_QUESTION = ("step", "budgets", "limit", "context", "retrieve")


def write_suite(workdir: Path, suite: Mapping) -> dict[str, Path]:
  """Writes a suite's record and its page.

  What is there already of another checkpoint or other settings is kept, under a name with its step.

  Args:
    workdir: of the run.
    suite: what `suite.run` found, with the entries that experiments/evaluate.py adds.

  Returns:
    {"file", "report"}.

  Raises:
    RunError: they cannot be written.
  """
  paths = {"file": workdir / file_name(suite), "report": workdir / page_name(suite)}
  try:
    _keep(paths["file"], paths["report"], suite)
    write_text(paths["file"], dump_json(suite, indent=1) + "\n")
  except OSError as error:
    raise RunError(f"{paths['file']} cannot be written: {error.strerror or error}") from error
  write_page(paths["report"], suite_page(suite, workdir.absolute().name))
  return paths


def _keep(file: Path, report: Path, suite: Mapping) -> None:
  """Renames the files of an earlier suite of this name, unless the same was asked."""
  if not file.exists():
    return
  try:
    earlier = json.loads(file.read_text(encoding="utf-8"))
    step, same = earlier["step"], _question(earlier) == _question(json.loads(dump_json(suite)))
  except (ValueError, KeyError, TypeError):  # not ours
    step, same = "unknown", False
  if same:
    return
  number = next(n for n in itertools.count(1) if not file.with_name(f"{file.stem}.step{step}.{n}.json").exists())
  for path in (file, report):
    if path.exists():
      path.rename(path.with_name(f"{path.stem}.step{step}.{number}{path.suffix}"))
  _log.info("%s is now %s.step%s.%d.json", file, file.stem, step, number)


def _question(suite: Mapping) -> list:
  about = {name: task["about"] for name, task in suite["tasks"].items()}
  return [*(suite[name] for name in _QUESTION), about]


def suite_page(suite: Mapping, run: str) -> str:
  """Returns the document; `run` is the run's name, for the title."""
  sections = [
    ("Quality against compute", curves(suite)),
    ("Results", task_table(suite)),
    ("Experts by kind of query", kind_table(suite)),
    ("By difficulty", difficulty_charts(suite) + _grades(suite)),
    ("How it was made", _origin(suite)),
  ]
  return page(f"moe_lab suite {suite['suite']}: {run}", _head(suite), sections)


def _head(suite: Mapping) -> str:
  about = [
    f"checkpoint of step {suite['step']}",
    f"routing by {suite['method']}",
    f"budgets {', '.join(number(budget) for budget in suite['budgets'])}",
    f"at most {suite['context']} tokens",
    f"at most {suite['limit']} items a task" if suite["limit"] else "all items",
  ]
  body = f'<p class="soft">{escape(" · ".join(about))}</p>'
  if suite["retrieve"]:
    body += note(
      f"With passages: the best {suite['retrieve']['shown']} of {suite['retrieve']['passages']} from "
      f"{suite['retrieve']['folder']} (BM25) stand before each question. {suite['withheld']} that hold a test item "
      "itself, its question's last words and its answer, were withheld."
    )
  return body


def _grades(suite: Mapping) -> str:
  """Returns the numbers of every kind, budget and grade, folded."""
  rows = [
    [
      escape(kind), escape(grade), number(entry["budget"]), number(row["answer_experts"]),
      number(row["prompt_experts"]), number(row["value"], 3), number(row["chance"], 3), str(row["items"]),
      scaled(row["flops_per_item"]),
    ]
    for entry in suite["by_kind"]
    for kind, all_grades in entry.get("alone", {}).items()
    for grade, row in all_grades["by_difficulty"].items()
  ]  # fmt: skip
  if not rows:
    return ""
  head = [
    "kind of query",
    "grade",
    "budget",
    "experts, answer",
    "experts, prompt",
    "right",
    "chance",
    "items",
    "FLOPs/item",
  ]
  return f"<details><summary>All grades</summary>{table(head, rows, text_columns=2, sortable=True)}</details>"


def _origin(suite: Mapping) -> str:
  rows = [
    [escape(name), escape(task["metric"]), f"<code>{escape(json.dumps(task['about'], ensure_ascii=False))}</code>"]
    for name, task in suite["tasks"].items()
  ]
  details = table(["task", "metric", "from"], rows, text_columns=3)
  languages = sorted(
    {lang for task in measured(suite).values() for lang in task["by_budget"][0].get("by_language", {})}
  )
  more = note(f"Languages: {', '.join(languages)}; the numbers by language are in the JSON file.") if languages else ""
  how = f"<p>Command <code>{escape(suite['command'])}</code></p><p>Code <code>{escape(suite['code'])}</code></p>"
  return how + details + more
