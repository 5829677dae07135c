"""Can a trained model of fixed k do with fewer experts? A policy on its frozen weights, and what knows nothing.

    python -m experiments.retrofit.study --workdir=runs/retrofit --split=test

For each seed trains a base (configs/retrofit.py, 4 of 16 experts; or takes --bases), and on it policies of counts by
several learners (configuration `retrofit` of experiments.adapt); what is trained already is taken as it is. Each policy
is compared with its own counts dealt out at random, with every token taking its mean, and with fixed counts. Table and
curves go to WORKDIR/study.html and study.json; the last line on stdout is the JSON result.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import modes, program
from moe_lab.errors import UserError, did_you_mean

CONFIG = Path(__file__).parents[2] / "configs/retrofit.py"
BUDGETS = (1.0, 4.0)  # mean experts: the range of a policy of any budget
ARMS = {  # fields of config.routing
  "curvature": {"learner": "curvature"},
  "curvature_any": {"learner": "curvature", "budget_range": BUDGETS},
  "leave_one_out": {"learner": "leave_one_out"},
  "ppo": {"learner": "ppo"},
}

FLAGS = flags.FlagValues()
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of bases and policies.", flag_values=FLAGS)
flags.DEFINE_list("bases", [], "Trained runs of fixed k, one for each seed, instead of new ones.", flag_values=FLAGS)
flags.DEFINE_string("size", "cpu", "Of configs/retrofit.py.", flag_values=FLAGS)
flags.DEFINE_list("arms", list(ARMS), "Learners of the policy.", flag_values=FLAGS)
flags.DEFINE_float("budget", 2.4, "Mean experts that a policy of one budget is trained for.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 1000, "Of the policy's training.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum(
  "split", "validation", ["validation", "test"], "Tune on validation; report, once, on test.", flag_values=FLAGS
)


def main(workdir: Path) -> dict:
  """Trains and compares all arms and seeds."""
  from experiments.retrofit import page
  from moe_lab.io.files import dump_json, write_text

  seeds = program.seeds(FLAGS.seeds)
  for arm in FLAGS.arms:
    if arm not in ARMS:
      raise UserError(f"--arms={arm}: wanted some of {', '.join(ARMS)}{did_you_mean(arm, list(ARMS))}")
  if FLAGS.bases and len(FLAGS.bases) != len(seeds):
    raise UserError(f"--bases={','.join(FLAGS.bases)}: wanted {len(seeds)}, one for each of --seeds")
  runs = []
  for index, seed in enumerate(seeds):
    folder = Path(FLAGS.bases[index]).expanduser() if FLAGS.bases else _base(workdir / f"base-{seed}", seed)
    for arm in FLAGS.arms:
      found = _policy(folder, workdir / f"{arm}-{seed}", arm, seed)
      runs.append({"arm": arm, "seed": seed} | found)
      print(f"{arm} {seed}: {page.in_words(found)}", file=sys.stderr, flush=True)
  study = {"split": FLAGS.split, "runs": runs, "summary": summarised(runs)}
  write_text(workdir / "study.json", dump_json(study, indent=1) + "\n")
  command = "python -m experiments.retrofit.study " + " ".join(sys.argv[1:])
  write_text(workdir / "study.html", page.page_of(study, command))
  print(page.table(study["summary"]), file=sys.stderr)
  return {"split": FLAGS.split, "summary": study["summary"], "workdir": workdir}


def _base(folder: Path, seed: int) -> Path:
  """Trains a model of fixed k, or goes on; returns its folder."""
  from moe_lab.config.load import load
  from moe_lab.config.resolve import resolve
  from moe_lab.train.loop import train

  config = resolve(load(f"{CONFIG}:{FLAGS.size}")).with_seed(seed)
  if not (folder / "evaluation.json").is_file():  # which is written last
    train(config, folder, program.cache_dir(), sys.argv)
  return folder


def _policy(base_folder: Path, folder: Path, arm: str, seed: int) -> dict:
  """Trains a policy on a base, and returns what it saves on the split; both are kept."""
  from moe_lab.config.resolve import resolve
  from moe_lab.data.loader import open_data
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.train.adapted import saved, train_adapted
  from moe_lab.train.base import load_base

  kept = folder / f"fewer_experts-{FLAGS.split}.json"
  if kept.is_file():
    return json.loads(kept.read_text())
  base = load_base(base_folder)
  begun = resolve(modes.begun("retrofit", base.config, base_folder)).with_seed(seed)
  routing = dataclasses.replace(begun.routing, budget=FLAGS.budget, **ARMS[arm])
  train = dataclasses.replace(begun.train, steps=FLAGS.steps)
  asked = dataclasses.replace(begun, routing=routing, train=train)
  config = modes.adapted("retrofit", base.config.with_seed(seed), asked, base_folder)
  found = train_adapted(base, config, folder, program.cache_dir(), sys.argv)["fewer_experts"]
  if FLAGS.split != "validation":  # which training ends with
    data = open_data(config.data, program.cache_dir())
    found = saved(base, config, load_base(folder).state, data, FLAGS.split)
  write_text(kept, dump_json(found, indent=1) + "\n")
  return found


def summarised(runs: list[dict]) -> list[dict]:
  """Returns means over seeds: of each arm and budget what the policy and its controls save and lose; of fixed counts.

  `proves`: the case says something, since random and equal counts of the policy's mean lose more than 1%, and one
  expert more than 3%.
  """
  rows = []
  for arm in dict.fromkeys(run["arm"] for run in runs):
    of_arm = [run for run in runs if run["arm"] == arm]
    for index, one in enumerate(of_arm[0]["policy"]):
      row = {"arm": arm, "budget": one["budget"]}
      for kind in ("policy", "random", "alike"):
        for field in ("experts", "saved", "rise"):
          row[f"{kind}_{field}"] = statistics.fmean(run[kind][index][field] for run in of_arm)
      row["rise_by_seed"] = {str(run["seed"]): run["policy"][index]["rise"] for run in of_arm}
      row["one_expert_rise"] = statistics.fmean(run["fixed"][0]["rise"] for run in of_arm)
      row["proves"] = row["random_rise"] > 0.01 and row["alike_rise"] > 0.01 and row["one_expert_rise"] > 0.03
      rows.append(row)
  return rows


if __name__ == "__main__":
  program.run(main, FLAGS)
