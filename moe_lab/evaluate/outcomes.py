"""Answers of an evaluation put together: quality and its compute, in all, by kind of query and by difficulty."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from moe_lab.evaluate.compute import Compute
from moe_lab.evaluate.significance import wilson_interval


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of one item.

  Attributes:
    kind: of query: recall, translation, reasoning, ...
    difficulty: its grade; None: not graded.
    language: of the item, if known.
    right: whether the answer is.
    compute: of everything that was asked for it.
    chance: of being right by guessing; None: as good as none, or not known.
    also: further measures of it, by name.
  """

  kind: str
  difficulty: int | str | None
  language: str | None
  right: bool
  compute: Compute
  chance: float | None = None
  also: dict[str, float] = dataclasses.field(default_factory=dict)


def summary(outcomes: Sequence[Outcome]) -> dict:
  """Returns the share that is right, with its uncertainty, and what it cost.

  Returns:
    value, stderr (of the mean of independent items; None for one), interval (95%), items, chance and also (what every
    item has), and the means of `Compute.report`, with flops_per_item and tokens_per_item.
  """
  items, right = len(outcomes), sum(outcome.right for outcome in outcomes)
  share = right / items
  chances = [outcome.chance for outcome in outcomes]
  compute = sum((outcome.compute for outcome in outcomes), Compute()).report()
  tokens = compute.pop("tokens")
  names = [name for name in outcomes[0].also if all(name in outcome.also for outcome in outcomes)]
  return {
    "value": share,
    "stderr": math.sqrt(share * (1 - share) / (items - 1)) if items > 1 else None,
    "interval": wilson_interval(right, items),
    "items": items,
    "chance": None if None in chances else statistics.fmean(chances),
    "also": {name: statistics.fmean(outcome.also[name] for outcome in outcomes) for name in names},
    **compute,
    "tokens_per_item": tokens / items,
    "flops_per_item": sum(outcome.compute.flops for outcome in outcomes) / items,
  }


def report(outcomes: Sequence[Outcome]) -> dict:
  """Returns the `summary`, and that of each kind, grade and language where there are several."""
  found = summary(outcomes)
  for name, key in (("kind", _kind), ("difficulty", _difficulty), ("language", _language)):
    groups = grouped(outcomes, key)
    if len(groups) > 1:
      found[f"by_{name}"] = {label: summary(group) for label, group in groups.items()}
  return found


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, dict]:
  """Returns the summary of each kind, over all tasks, with that of each of its grades as by_difficulty."""
  return {
    kind: summary(group)
    | {"by_difficulty": {grade: summary(graded) for grade, graded in grouped(group, _difficulty).items()}}
    for kind, group in grouped(outcomes, _kind).items()
  }


def grouped(outcomes: Sequence[Outcome], key: Callable[[Outcome], str | None]) -> dict[str, list[Outcome]]:
  """Returns the outcomes by label, labels in order, numbers by their size; those without a label are left out."""
  groups: dict[str, list[Outcome]] = {}
  for outcome in outcomes:
    label = key(outcome)
    if label is not None:
      groups.setdefault(label, []).append(outcome)
  return dict(sorted(groups.items(), key=lambda entry: (len(entry[0]) if entry[0].isdecimal() else 0, entry[0])))


def _kind(outcome: Outcome) -> str:
  return outcome.kind


def _difficulty(outcome: Outcome) -> str | None:
  return None if outcome.difficulty is None else str(outcome.difficulty)


def _language(outcome: Outcome) -> str | None:
  return outcome.language
