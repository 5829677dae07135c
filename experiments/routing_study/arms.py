"""The runs of a study put together: a row for each arm (mean and spread over seeds), and ours against its controls.

What an arm is comes from the notes of its runs in the sweep:

  role      fixed (a fixed count: the curve that others are held against) | ours | control | dense | anything else
  family    the method, for curves over its budgets and for colours
  budget    mean experts asked for; ours is compared with the controls of the same budget
  k         of a fixed count
  controls, budgets, removal: what is measured besides (see measure.py)
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.routing_study.measure import BOUNDS, CONTROLS, OWN
from moe_lab.evaluate.significance import paired_difference
from moe_lab.evaluate.tradeoff import loss_at, matched

CONDITIONED_MEAN = 0.03  # how near one checkpoint's mean must come to each budget, relative
CONDITIONED_LOSS = 0.01  # and how near its loss to that of the model trained for that budget alone


class Arm(NamedTuple):
  """The runs that differ by their seed alone; those that failed are left out."""

  corpus: str
  name: str
  notes: Mapping[str, str]
  runs: Mapping[str, dict]  # seed -> the run's record
  failed: Mapping[str, str]  # seed -> why

  @property
  def role(self) -> str:
    return self.notes.get("role", "")

  @property
  def family(self) -> str:
    return self.notes.get("family", self.name)

  def by_seed(self, key: str, rule: str = OWN) -> dict[str, float]:
    """Returns seed -> a number of a rule, of the runs that were measured under it."""
    return {seed: run["rules"][rule][key] for seed, run in self.runs.items() if rule in run["rules"]}

  def mean(self, key: str, rule: str = OWN) -> float:
    return statistics.fmean(self.by_seed(key, rule).values())


def arms_of(runs: Sequence[dict]) -> list[Arm]:
  """Groups records {"labels", "notes", "failed", what `measure` gives} by all labels but the seed, in their order."""
  groups: dict[tuple, list[dict]] = {}
  for run in runs:
    groups.setdefault(tuple(item for item in run["labels"].items() if item[0] != "seed"), []).append(run)
  arms = []
  for labels, members in groups.items():
    named = dict(labels)
    corpus = named.pop("corpus", "")
    done = {run["labels"].get("seed", "0"): run for run in members if not run["failed"]}
    failed = {run["labels"].get("seed", "0"): run["failed"] for run in members if run["failed"]}
    arms.append(Arm(corpus, "-".join(named.values()), members[0]["notes"], done, failed))
  return arms


def rows(arms: Sequence[Arm]) -> list[dict]:
  """Returns the table: an entry for each arm with a finished run."""
  return [_row(arm) for arm in arms if arm.runs]


def _row(arm: Arm) -> dict:
  runs = list(arm.runs.values())
  own = [run["rules"][OWN] for run in runs]
  classes = {name: [result["by_class"].get(name) for result in own] for name in own[0]["by_class"]}
  return {
    "corpus": arm.corpus,
    "arm": arm.name,
    "role": arm.role,
    "family": arm.family,
    "seeds": list(arm.runs),
    "failed": dict(arm.failed),
    **{
      key: spread([result[key] for result in own])
      for key in ("loss", "bits_per_byte", "mean_experts", "flops_per_token")
    },
    **{f"training_{key}": spread([run["training"][key] for run in runs]) for key in ("tokens", "flops", "seconds")},
    "parameters": runs[0]["parameters"],
    "by_class": {name: _class_means([entry for entry in found if entry]) for name, found in classes.items()},
    "max_over_mean_load": _by_layer([run["max_over_mean_load"] for run in runs], statistics.fmean),
    "dead_experts": _by_layer([run["dead_experts"] for run in runs], max),
    "load": runs[0]["rules"][OWN]["load"],
    "alarms": {seed: run["alarms"] for seed, run in arm.runs.items() if run["alarms"]},
  }


def _class_means(entries: Sequence[dict]) -> dict:
  return {key: statistics.fmean(entry[key] for entry in entries) for key in ("loss", "mean_experts", "tokens")}


def _by_layer(by_run: Sequence[Sequence[float]], reduce: Callable) -> list[float]:
  return [reduce(layer) for layer in zip(*by_run, strict=True)]


def spread(values: Sequence[float | None]) -> dict | None:
  """Returns {"mean", "spread"}: over seeds, the spread as a standard deviation, None for one; None if a value is."""
  if None in values:
    return None
  return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def comparisons(arms: Sequence[Arm]) -> list[dict]:
  """Returns our arms against each control of theirs, paired by seed.

  An entry's "matched" says whether the control's mean FLOPs per token are within 2% of ours: where they are not, its
  "win" is no result at equal compute. "flops_ratio" and "training_flops_ratio" are ours over the control's. "seeds" is
  how many of ours there are: a control that failed on one has fewer, and a comparison with it is not complete. "bound":
  the control has seen the targets, and says only how far judgement could get.
  """
  found = []
  for arm in arms:
    if arm.role != "ours" or not arm.runs:
      continue
    for rule in CONTROLS:
      if arm.by_seed("loss", rule):
        found.append(_comparison(arm, f"own counts, {rule}", arm, rule) | {"bound": rule in BOUNDS})
    for other in arms:
      same = other.corpus == arm.corpus and other.notes.get("budget") == arm.notes.get("budget")
      if other.role == "control" and same:
        found.append(_comparison(arm, other.name, other))
    if curve := _fixed_at_ours(arm, arms):
      entry = {"matched": True, "flops_ratio": 1.0, "training_flops_ratio": None}
      found.append(_difference(arm, "fixed k, interpolated to our FLOPs", curve) | entry)
  return found


def _comparison(arm: Arm, name: str, other: Arm, rule: str = OWN) -> dict:
  if not other.runs:  # all failed
    return _difference(arm, name, {}) | {"matched": False, "flops_ratio": None, "training_flops_ratio": None}
  ours, theirs = arm.mean("flops_per_token"), other.mean("flops_per_token", rule)
  training = [statistics.fmean(run["training"]["flops"] for run in a.runs.values()) for a in (arm, other)]
  return _difference(arm, name, other.by_seed("loss", rule)) | {
    "matched": matched(theirs, ours),
    "flops_ratio": ours / theirs,
    "training_flops_ratio": training[0] / training[1],
  }


def _difference(arm: Arm, name: str, control: Mapping[str, float]) -> dict:
  difference = paired_difference(arm.by_seed("loss"), control)
  about = {"corpus": arm.corpus, "arm": arm.name, "control": name, "seeds": len(arm.runs), "bound": False}
  return about | difference._asdict()


def _fixed_at_ours(arm: Arm, arms: Sequence[Arm]) -> dict[str, float]:
  """Returns seed -> loss of the curve of fixed counts at the FLOPs that our run of that seed spends."""
  fixed = [other for other in arms if other.role == "fixed" and other.corpus == arm.corpus]
  found = {}
  for seed, flops in arm.by_seed("flops_per_token").items():
    curve = [
      (other.by_seed("flops_per_token")[seed], other.by_seed("loss")[seed]) for other in fixed if seed in other.runs
    ]
    found[seed] = loss_at(curve, flops)
  return {seed: loss for seed, loss in found.items() if loss is not None}


def conditioned(arms: Sequence[Arm]) -> list[dict]:
  """Returns, for each arm that was measured at several budgets, how it holds them beside a model trained for each.

  "alone" is our arm whose "budget" note is that budget, None without one; "holds": the realised mean is within 3% of
  the budget and the loss at most 1% above that model's.
  """
  found = []
  for arm in arms:
    rules = dict.fromkeys(rule for run in arm.runs.values() for rule in run["rules"] if rule.startswith("budget "))
    for rule in rules:
      budget = float(rule.split()[1])
      alone = next((other for other in arms if _trained_for(other, budget) and other.corpus == arm.corpus), None)
      realised, loss = arm.mean("mean_experts", rule), arm.mean("loss", rule)
      loss_alone = alone.mean("loss") if alone else None
      ratio = loss / loss_alone if alone else None
      near = abs(realised / budget - 1) <= CONDITIONED_MEAN
      found.append(
        {
          "corpus": arm.corpus,
          "arm": arm.name,
          "budget": budget,
          "realised": realised,
          "loss": loss,
          "alone": alone.name if alone else None,
          "loss_alone": loss_alone,
          "loss_ratio": ratio,
          "holds": near and ratio <= 1 + CONDITIONED_LOSS if alone else None,
        }
      )
  return found


def _trained_for(arm: Arm, budget: float) -> bool:
  return arm.role == "ours" and bool(arm.runs) and "budgets" not in arm.notes and float(arm.notes["budget"]) == budget
