"""Does the policy spend where compute helps? Three seeds, two policies, controls of equal compute.

    python -m experiments.difficulty.study --config=configs/difficulty.py --workdir=runs/difficulty

Trains `hidden` and `token` for each seed (what is trained already is taken as
it is) and evaluates each on the validation and test splits: with its own greedy
counts, with the same counts shuffled within each layer, and with fixed counts.
The table goes to stderr and to WORKDIR/study.json; the last line on stdout is
the JSON result.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.config.schema import Config

FLAGS = flags.FlagValues()
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to train.", flag_values=FLAGS)

CLASSES = ("easy", "hard", "noise")
ARMS = ("hidden", "token")


def _evaluate_arm(workdir: Path) -> dict:
  """Returns the evaluations of one trained run, by split and rule."""
  from moe_lab.data.loader import open_data
  from moe_lab.evaluate.controls import fixed_count, shuffled_counts
  from moe_lab.evaluate.perplexity import evaluate, make_eval_step
  from moe_lab.train.load import load_model

  loaded = load_model(workdir)
  config, data = loaded.config, open_data(loaded.config.data, program.cache_dir())
  eval_step = make_eval_step(config, loaded.model)
  num_layers = config.model.num_layers - config.model.num_dense_layers
  rules = {"greedy": None, "shuffled": shuffled_counts(eval_step, loaded.params, loaded.router_state, loaded.budget, 0)}
  rules |= {f"fixed {k}": fixed_count(num_layers, k) for k in (1, 2, 4, config.routing.k_max)}
  results = {}
  for split in ("validation", "test"):
    for rule, decide in rules.items():
      result = evaluate(
        eval_step,
        loaded.params,
        loaded.router_state,
        data.eval_batches(split, config.train.batch_size),
        loaded.budget,
        class_names=data.class_names,
        slots=config.routing.slots,
        decide=decide,
      )
      results.setdefault(split, {})[rule] = {key: result[key] for key in ("loss", "mean_experts", "by_class")}
  return results


def _row(label: str, result: dict) -> str:
  classes = "  ".join(
    f"{name} {result['by_class'][name]['loss']:.3f} / {result['by_class'][name]['mean_experts']:.2f}"
    for name in CLASSES
  )
  return f"{label:26} loss {result['loss']:.4f}  experts {result['mean_experts']:.3f}   {classes}"


def main(config: Config, workdir: Path) -> dict:
  """Trains and evaluates all arms and seeds."""
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.train.loop import train

  runs = []
  for seed in program.seeds(FLAGS.seeds):
    for arm in ARMS:
      folder = workdir / f"{arm}-{seed}"
      arm_routing = dataclasses.replace(config.routing, policy_input=arm)
      arm_config = dataclasses.replace(config, routing=arm_routing).with_seed(seed)
      trained = train(arm_config, folder, program.cache_dir(), sys.argv)
      splits = _evaluate_arm(folder)
      runs.append({"arm": arm, "seed": seed, "mean_experts_in_training": trained["mean_experts"], **splits})
      for rule, result in splits["test"].items():
        print(_row(f"{arm} seed {seed} {rule}", result), file=sys.stderr, flush=True)

  def ratio(run: dict, other: str) -> float:
    by_class = run["test"]["greedy"]["by_class"]
    return by_class["hard"]["mean_experts"] / by_class[other]["mean_experts"]

  hidden = [run for run in runs if run["arm"] == "hidden"]
  token = [run for run in runs if run["arm"] == "token"]
  write_text(workdir / "study.json", dump_json(runs, indent=1) + "\n")
  return {
    "split": "test",
    "seeds": [run["seed"] for run in hidden],
    "hard_over_easy": [ratio(run, "easy") for run in hidden],
    "hard_over_noise": [ratio(run, "noise") for run in hidden],
    "mean_experts": [run["test"]["greedy"]["mean_experts"] for run in hidden],
    "loss": [run["test"]["greedy"]["loss"] for run in hidden],
    "loss_shuffled": [run["test"]["shuffled"]["loss"] for run in hidden],
    "loss_token_policy": [run["test"]["greedy"]["loss"] for run in token],
    "mean_experts_token_policy": [run["test"]["greedy"]["mean_experts"] for run in token],
    "workdir": workdir,
  }


if __name__ == "__main__":
  program.run(main, FLAGS)
