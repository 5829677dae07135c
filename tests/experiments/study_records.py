"""Made-up records of a routing study's runs, as `measure` gives them."""

from experiments.routing_study import analyses, arms


def result(loss, mean_experts, flops, **more):
  return {
    "loss": loss,
    "bits_per_byte": loss / 2,
    "mean_experts": mean_experts,
    "flops_per_token": flops,
    "by_class": {
      "word": {"tokens": 60, "loss": loss + 1, "mean_experts": mean_experts + 0.5},
      "<space>": {"tokens": 40, "loss": loss - 1, "mean_experts": mean_experts - 0.5},
    },
    "load": [[0.25, 0.25, 0.25, 0.25], [0.7, 0.2, 0.1, 0.0]],
    **more,
  }


def run(corpus, arm, seed, loss, *, mean_experts=2.0, flops=200.0, rules=None, notes=None, parameters=1e3, failed=None):
  """Returns one record; `rules` are further ones by name."""
  labels = {"corpus": corpus, "arm": arm, "seed": str(seed)}
  record = {"name": "-".join(labels.values()), "labels": labels, "notes": notes or {}, "failed": failed}
  if failed:
    return record
  return record | {
    "step": 10,
    "split": "validation",
    "rules": {"own": result(loss, mean_experts, flops), **(rules or {})},
    "parameters": parameters,
    "training": {
      "tokens": 1000.0,
      "flops": 3000.0 * flops,
      "seconds": 10.0 * flops / 200,
      "learning_curve": [(250.0, 1e5, loss + 1.0), (500.0, 2e5, loss + 0.5), (1000.0, 4e5, loss)],
    },
    "alarms": ["layer 1: 1 of 4 experts are dead"] if seed == 1 else [],
    "dead_experts": [0, 1],
    "max_over_mean_load": [1.0, 2.8],
  }


def study_runs():
  """Two seeds of: fixed k = 1, 2, 4; random counts; ours at 2 and 3 and at any budget; dense models; a failed run."""
  runs = []
  for seed in (0, 1):
    up = 0.1 * seed  # seeds differ by more than methods do
    for k, loss in ((1, 4.0), (2, 3.8), (4, 3.6)):
      notes = {"role": "fixed", "family": "fixed k", "budget": str(k), "k": str(k)}
      runs.append(run("books", f"topk-{k}", seed, loss + up, mean_experts=k, flops=100.0 * k, notes=notes))
    notes = {"role": "control", "family": "random", "budget": "2"}
    runs.append(run("books", "random-2", seed, 3.9 + up, flops=202.0, notes=notes))
    notes = {"role": "control", "family": "null", "budget": "2"}
    runs.append(run("books", "null-2", seed, 3.7 + up, flops=230.0, notes=notes))
    shuffled = {"shuffled": result(3.76 + up, 2.0, 200.0)}
    notes = {"role": "ours", "family": "dynamic", "budget": "2", "controls": "shuffled"}
    removal = {"removal": {"rise": [[0.1, 0.2], [0.3, 0.0]], "max_rise": 0.3, "loss": 3.7, "layer": 1, "expert": 0}}
    own = run("books", "dynamic-2", seed, 3.7 + up + 0.01 * seed, rules=shuffled | removal, notes=notes)
    runs.append(own)
    notes = {"role": "ours", "family": "dynamic", "budget": "3"}
    runs.append(run("books", "dynamic-3", seed, 3.5 + up, mean_experts=3.0, flops=300.0, notes=notes))
    at_any = {"budget 2": result(3.72 + up, 2.04, 204.0), "budget 3": result(3.6 + up, 3.2, 320.0)}
    notes = {"role": "other", "family": "dynamic, any budget", "budget": "2", "budgets": "2,3"}
    runs.append(run("books", "dynamic-any", seed, 3.72 + up, rules=at_any, notes=notes))
    for size, loss in ((400.0, 3.9), (800.0, 3.7), (1600.0, 3.5)):
      notes = {"role": "dense", "family": "dense", "budget": "1"}
      runs.append(
        run("books", f"dense-{size:g}", seed, loss + up, mean_experts=1, flops=size, notes=notes, parameters=int(size))
      )
  notes = {"role": "control", "family": "random", "budget": "2"}
  return [*runs, run("books", "random-2", 2, 0, notes=notes, failed="3 updates <in a row>")]


def analysed(runs):
  """Returns what the study puts together of runs, for its page."""
  groups = arms.arms_of(runs)
  return {
    "sweep": "sweep.py",
    "split": "validation",
    "command": "python -m <study>",
    "arms": arms.rows(groups),
    "comparisons": arms.comparisons(groups),
    "conditioned": arms.conditioned(groups),
    "experts_needed": analyses.experts_needed(groups, 8),
    "removals": analyses.removals(groups),
    "against_dense": analyses.against_dense(groups),
    "scaling": analyses.scaling_fits(groups),
    "runs": runs,
  }
