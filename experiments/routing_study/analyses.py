"""What the arms say beyond their table: experts saved, experts leant on, and sizes against dense models."""

import statistics
from collections.abc import Sequence

from experiments.routing_study.arms import Arm, spread
from experiments.routing_study.measure import OWN, REMOVAL
from moe_lab.evaluate.savings import savings
from moe_lab.evaluate.scaling import equal_loss_ratio, fit_power_law, saved_to_loss


def experts_needed(arms: Sequence[Arm], k_max: int) -> list[dict]:
  """Returns, for each method with several budgets, what it needs to reach fixed k_max / 2 (see `savings.Savings`)."""
  found = []
  for corpus in dict.fromkeys(arm.corpus for arm in arms):
    fixed: dict[str, dict[int, float]] = {}
    families: dict[str, dict[str, list]] = {}
    for arm in arms:
      if arm.corpus != corpus:
        continue
      if arm.role == "fixed":
        for seed, loss in arm.by_seed("loss").items():
          fixed.setdefault(seed, {})[int(arm.notes["k"])] = loss
      elif arm.role != "dense":
        points = families.setdefault(arm.family, {})
        for seed, run in arm.runs.items():
          # A checkpoint that serves many budgets is a whole curve.
          rules = [rule for rule in run["rules"] if rule.startswith("budget ")] or [OWN]
          points.setdefault(seed, []).extend((run["rules"][r]["mean_experts"], run["rules"][r]["loss"]) for r in rules)
    for family, points in families.items():
      if max(map(len, points.values()), default=0) > 1 and (result := savings(fixed, points, k_max)):
        found.append({"corpus": corpus, "family": family, **result._asdict()})
  return found


def removals(arms: Sequence[Arm]) -> list[dict]:
  """Returns, for each arm that was measured so, how far the loss rises without its most needed expert, over seeds."""
  found = []
  for arm in arms:
    runs = [run for run in arm.runs.values() if REMOVAL in run["rules"]]
    if runs:
      rises = [run["rules"][REMOVAL] for run in runs]
      found.append(
        {
          "corpus": arm.corpus,
          "arm": arm.name,
          "seeds": len(runs),
          "loss": spread([run["rules"][OWN]["loss"] for run in runs]),
          "max_rise": spread([rise["max_rise"] for rise in rises]),
          "mean_rise": spread([statistics.fmean(map(statistics.fmean, rise["rise"])) for rise in rises]),
          "max_over_mean_load": spread([max(run["max_over_mean_load"]) for run in runs]),
        }
      )
  return found


def against_dense(arms: Sequence[Arm]) -> list[dict]:
  """Returns, for each arm of a corpus with dense models, dense over ours at our loss: paired by seed, then averaged.

  flops_ratio: FLOPs per token of a dense model of our loss, between the dense sizes that were trained. tokens_ratio and
  seconds_ratio: what the largest dense model no better than we are took in training, over what we took to its loss (by
  the losses of the evaluations on the way, all on the same batches). None where the curves do not meet.
  """
  found = []
  for arm in arms:
    dense = [other for other in arms if other.role == "dense" and other.corpus == arm.corpus]
    if arm.role == "dense" or not dense or not arm.runs:
      continue
    ratios: dict[str, list] = {"flops_ratio": [], "tokens_ratio": [], "seconds_ratio": []}
    for seed, run in arm.runs.items():
      beside = [other.runs[seed] for other in dense if seed in other.runs]
      curve = [(other["rules"][OWN]["flops_per_token"], other["rules"][OWN]["loss"]) for other in beside]
      own = run["rules"][OWN]
      ratios["flops_ratio"].append(equal_loss_ratio(curve, own["flops_per_token"], own["loss"]))
      tokens, seconds = _training_ratios(run, beside)
      ratios["tokens_ratio"].append(tokens)
      ratios["seconds_ratio"].append(seconds)
    means = {name: statistics.fmean(values) if None not in values else None for name, values in ratios.items()}
    parameters = next(iter(arm.runs.values()))["parameters"]
    found.append({"corpus": arm.corpus, "arm": arm.name, "parameters": parameters, "by_seed": ratios, **means})
  return found


def _training_ratios(run: dict, dense: Sequence[dict]) -> tuple[float | None, float | None]:
  ours = run["training"]["learning_curve"]
  reached = [other for other in dense if other["training"]["learning_curve"] and ours]
  reached = [other for other in reached if _last_loss(other) >= ours[-1][2]]
  if not reached:
    return None, None
  other = max(reached, key=lambda found: found["rules"][OWN]["flops_per_token"])["training"]
  curve = [(tokens, loss) for tokens, _, loss in ours]
  tokens = saved_to_loss(curve, other["tokens"], other["learning_curve"][-1][2])
  if tokens is None:
    return None, None
  seconds_per_token = [training["seconds"] / training["tokens"] for training in (other, run["training"])]
  return tokens, tokens * seconds_per_token[0] / seconds_per_token[1]


def _last_loss(run: dict) -> float:
  return run["training"]["learning_curve"][-1][2]


def scaling_fits(arms: Sequence[Arm]) -> list[dict]:
  """Returns the power law of each kind of model (dense, or a method's family) of a corpus, over sizes and seeds."""
  groups: dict[tuple[str, str], list] = {}
  for arm in arms:
    kind = "dense" if arm.role == "dense" else arm.family
    for run in arm.runs.values():
      own = run["rules"][OWN]
      groups.setdefault((arm.corpus, kind), []).append((own["flops_per_token"], run["parameters"], own["loss"]))
  fits = {key: fit_power_law(models) for key, models in groups.items()}
  return [
    {"corpus": corpus, "family": kind} | {name: _plain(value) for name, value in fit._asdict().items()}
    for (corpus, kind), fit in fits.items()
    if fit is not None
  ]


def _plain(value: object) -> object:
  return value._asdict() if hasattr(value, "_asdict") else value
