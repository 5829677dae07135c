"""How far do adapters move the routing, and does holding the router help? LoRA on a shifted domain.

    python -m experiments.adapter_drift.study --base=runs/a --config.data.sources=text:/other --workdir=runs/drift

Trains adapters of one size on the new text for every seed and arm: the router frozen, trained, and held to the base's
choice by a divergence of several weights. What is trained already is taken as it is. The table goes to stderr and to
WORKDIR/study.json; the last line on stdout is the JSON result.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import modes, program
from moe_lab.config.load import of_run
from moe_lab.config.schema import Config
from moe_lab.errors import UserError

EQUAL = 0.005  # relative difference of the target's loss up to which two arms count as equally good

FLAGS = flags.FlagValues()
flags.DEFINE_string("base", None, "The folder of the trained run.", flag_values=FLAGS)
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the adapters and of the data's order.", flag_values=FLAGS)
flags.DEFINE_list("weights", ["0.1", "1", "10"], "Weights of the divergence, for the arms held.", flag_values=FLAGS)


def arms(weights: list[float]) -> dict[str, dict]:
  """Returns the fields of `config.adapt` of each arm."""
  held = {f"held_{weight:g}": {"router": "held", "router_kl_weight": weight} for weight in weights}
  return {"frozen": {"router": "frozen"}, "trained": {"router": "trained"}} | held


def main(workdir: Path, config: Config | None = None) -> dict:
  """Trains and compares all arms and seeds."""
  if config is None or FLAGS.base is None:
    raise UserError("--base: wanted the folder of a trained run, as in --base=runs/quickstart")
  folder, seeds = Path(FLAGS.base).expanduser(), program.seeds(FLAGS.seeds)
  try:
    weights = [float(weight) for weight in FLAGS.weights]
  except ValueError:
    raise UserError(f"--weights={','.join(FLAGS.weights)}: wanted numbers, as in 0.1,1,10") from None
  trained, configs = of_run(FLAGS.base), {}
  for arm, fields in arms(weights).items():
    for seed in seeds:
      asked = dataclasses.replace(config.with_seed(seed), adapt=dataclasses.replace(config.adapt, **fields))
      configs[arm, seed] = modes.adapted("lora", trained, asked, folder)
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.train.adapted import train_adapted
  from moe_lab.train.base import load_base

  base, runs = load_base(folder), []
  for (arm, seed), config in configs.items():
    report = train_adapted(base, config, workdir / f"{arm}-{seed}", program.cache_dir(), sys.argv)
    runs.append({"arm": arm, "seed": seed} | report)
  summary = summarised(runs)
  write_text(workdir / "study.json", dump_json({"runs": runs, "summary": summary}, indent=1) + "\n")
  print(table(summary), file=sys.stderr)
  return {"summary": summary, "workdir": workdir}


def summarised(runs: list[dict]) -> dict[str, dict[str, float]]:
  """Returns means over seeds by arm: loss on the target, and drift on both texts.

  `equal` says whether the arm's loss is within `EQUAL` of that of the router trained freely, or below.
  """
  found: dict[str, dict] = {}
  for arm in dict.fromkeys(run["arm"] for run in runs):
    of_arm = [run for run in runs if run["arm"] == arm]

    def mean(text, field, of_arm=of_arm):
      values = [run[text][field] for run in of_arm if text in run]
      return sum(values) / len(values) if values else None

    row = {"loss": mean("drift_target", "loss_after"), "source_loss": mean("drift_source", "loss_after")}
    for text in ("target", "source"):
      for field in ("router_kl", "jaccard", "flips", "count_drift"):
        row[f"{text}_{field}"] = mean(f"drift_{text}", field)
    found[arm] = row | {"adapter_parameters": of_arm[0]["adapter_parameters"], "seeds": len(of_arm)}
  if "trained" in found:
    for row in found.values():
      row["equal"] = row["loss"] <= (1 + EQUAL) * found["trained"]["loss"]
  return found


def table(summary: dict[str, dict]) -> str:
  """Returns the summary as a table."""
  fields = ("loss", "source_loss", "target_router_kl", "source_router_kl", "target_jaccard", "source_jaccard")
  rows = [("arm", *(field.replace("_", " ") for field in fields))]
  for arm, row in summary.items():
    rows.append((arm, *("-" if row[field] is None else f"{row[field]:.4f}" for field in fields)))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
  program.run(main, FLAGS)
