"""A suite of tasks, asked of one checkpoint at several budgets, with and without passages: quality and its compute."""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from moe_lab.errors import UserError
from moe_lab.evaluate.outcomes import Outcome, by_kind, report
from moe_lab.evaluate.passages import Passages
from moe_lab.evaluate.scoring import Scorer

_log = logging.getLogger(__name__)


class Task(Protocol):
  """Something with items.

  Attributes:
    name: of the task.
    metric: what `right` means.
    about: where it comes from, for the record.
  """

  name: str
  metric: str
  about: dict

  def answer(self, scorer: Scorer, budget: float, passages: Passages | None) -> list[Outcome]:
    """Asks every item.

    Raises:
      Skipped: it cannot be asked here.
    """


class Skipped(UserError):
  """A task that cannot be asked on this machine; the others can."""


def run(tasks: Sequence[Task], scorer: Scorer, budgets: Sequence[float], passages: Passages | None) -> dict:
  """Asks all tasks.

  Args:
    tasks: with different names.
    scorer: the model.
    budgets: mean experts to ask for, each of which everything is asked with.
    passages: None: nothing is put before a question; else everything is asked without and with them.

  Returns:
    tasks: by name metric, about, and by_budget: for each budget "budget", `outcomes.report`, and with passages the
    same again as "retrieved"; or "skipped", why. by_kind: for each budget "budget", and of all tasks together
    `outcomes.by_kind` as "alone" and as "retrieved". withheld: passages that held an item itself.
  """
  found = {task.name: {"metric": task.metric, "about": task.about, "by_budget": []} for task in tasks}
  kinds = []
  for budget in budgets:
    together: dict[str, list[Outcome]] = {}
    for task in tasks:
      entry = found[task.name]
      if "skipped" in entry:
        continue
      try:
        reports = {}
        for name, given in (("alone", None), ("retrieved", passages))[: 1 + (passages is not None)]:
          outcomes = _timed(task, scorer, budget, given)
          together.setdefault(name, []).extend(outcomes)
          reports[name] = report(outcomes)
      except Skipped as reason:
        _log.warning("%s: skipped: %s", task.name, reason)
        entry["skipped"] = str(reason)
        continue
      entry["by_budget"].append({"budget": budget} | reports.pop("alone") | reports)
    kinds.append({"budget": budget} | {name: by_kind(outcomes) for name, outcomes in together.items()})
  return {"tasks": found, "by_kind": kinds, "withheld": passages.withheld if passages else 0}


def _timed(task: Task, scorer: Scorer, budget: float, passages: Passages | None) -> list[Outcome]:
  started = time.monotonic()
  outcomes = task.answer(scorer, budget, passages)
  found = report(outcomes)
  _log.info(
    "%s%s, budget %g: %s %.3f of %d, experts %.2f, %.1f s",
    task.name, " with passages" if passages else "", budget, task.metric, found["value"], found["items"],
    found["mean_experts"], time.monotonic() - started,
  )  # fmt: skip
  return outcomes
