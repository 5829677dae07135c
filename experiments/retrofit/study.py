"""Can a trained model of fixed k do with fewer experts? A policy on its frozen weights, and what knows nothing.

    python -m experiments.retrofit.study --workdir=runs/retrofit --split=test
    python -m experiments.retrofit.study --upcycled --workdir=runs/retrofit_upcycled --split=test

For each seed trains a base (configs/retrofit.py, 4 of 16 experts; with --upcycled, such experts of a dense model; or
takes --bases), and on it policies of counts by several learners (configuration `retrofit` of experiments.adapt); what
is trained already is taken as it is. Each policy is compared with its own counts dealt out at random, with every token
taking its mean, and with fixed counts. Table and curves go to WORKDIR/study.html and study.json; the last line on
stdout is the JSON result.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import modes, program
from moe_lab.errors import UserError, did_you_mean

LOSES, APART = 0.01, 0.03  # rises of the loss that controls and one expert must exceed for a case to say something
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
flags.DEFINE_bool("upcycled", False, "Make the bases of dense models, and train them on.", flag_values=FLAGS)
flags.DEFINE_string("size", "cpu", "Of configs/retrofit.py.", flag_values=FLAGS)
flags.DEFINE_list("arms", list(ARMS), "Learners of the policy.", flag_values=FLAGS)
flags.DEFINE_float("budget", 2.4, "Mean experts that a policy of one budget is trained for.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 1000, "Of the policy's training.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum(
  "split", "validation", ["validation", "test"], "Tune on validation; report, once, on test.", flag_values=FLAGS
)


def main(workdir: Path) -> dict:
  """Trains and compares all arms and seeds."""
  from experiments.retrofit import bases, page
  from moe_lab.io.files import dump_json, write_text

  seeds = program.seeds(FLAGS.seeds)
  for arm in FLAGS.arms:
    if arm not in ARMS:
      raise UserError(f"--arms={arm}: wanted some of {', '.join(ARMS)}{did_you_mean(arm, list(ARMS))}")
  if FLAGS.bases and len(FLAGS.bases) != len(seeds):
    raise UserError(f"--bases={','.join(FLAGS.bases)}: wanted {len(seeds)}, one for each of --seeds")
  if FLAGS.bases and FLAGS.upcycled:
    raise UserError(f"--bases={','.join(FLAGS.bases)}: wanted without --upcycled, which makes them")
  runs, upcycled = [], []
  for index, seed in enumerate(seeds):
    if FLAGS.bases:
      folder = Path(FLAGS.bases[index]).expanduser()
    elif FLAGS.upcycled:
      folder = bases.upcycled(workdir, FLAGS.size, seed)
    else:
      folder = bases.fixed(workdir / f"base-{seed}", FLAGS.size, seed)
    for arm in FLAGS.arms:
      found = _policy(folder, workdir / f"{arm}-{seed}", arm, seed)
      runs.append({"arm": arm, "seed": seed} | found)
      print(f"{arm} {seed}: {page.in_words(found)}", file=sys.stderr, flush=True)
    if FLAGS.upcycled:
      one = runs[-1]["fixed"][0]["rise"]
      made = bases.upcycling(workdir, seed, FLAGS.split)
      upcycled.append({"seed": seed} | made | {"one_expert_rise": one, "apart": one > APART})
  study = {"split": FLAGS.split, "upcycled": upcycled, "runs": runs, "summary": summarised(runs)}
  write_text(workdir / "study.json", dump_json(study, indent=1) + "\n")
  command = "python -m experiments.retrofit.study " + " ".join(sys.argv[1:])
  write_text(workdir / "study.html", page.page_of(study, command))
  print(page.text(study), file=sys.stderr)
  return {key: study[key] for key in ("split", "upcycled", "summary")} | {"workdir": workdir}


def _policy(base_folder: Path, folder: Path, arm: str, seed: int) -> dict:
  """Trains a policy on a base, and returns what it saves on the split; both are kept."""
  from moe_lab.config.load import of_run
  from moe_lab.config.resolve import resolve
  from moe_lab.data.loader import open_data
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.io.run import is_finished
  from moe_lab.train.adapted import saved, train_adapted
  from moe_lab.train.base import load_base

  base_config = of_run(str(base_folder))
  begun = resolve(modes.begun("retrofit", base_config, base_folder)).with_seed(seed)
  routing = dataclasses.replace(begun.routing, budget=FLAGS.budget, **ARMS[arm])
  train = dataclasses.replace(begun.train, steps=FLAGS.steps)
  asked = dataclasses.replace(begun, routing=routing, train=train)
  config = modes.adapted("retrofit", base_config.with_seed(seed), asked, base_folder)
  kept, trained = folder / f"fewer_experts-{FLAGS.split}.json", folder / "adaptation.json"  # the latter is written last
  done = trained.is_file() and is_finished(folder, config)
  if done and kept.is_file():
    return json.loads(kept.read_text())
  base = load_base(base_folder)
  if not done:
    train_adapted(base, config, folder, program.cache_dir(), sys.argv)
  found = json.loads(trained.read_text())["fewer_experts"]  # of the validation split
  if FLAGS.split != "validation":
    data = open_data(config.data, program.cache_dir())
    found = saved(base, config, load_base(folder).state, data, FLAGS.split)
  write_text(kept, dump_json(found, indent=1) + "\n")
  return found


def summarised(runs: list[dict]) -> list[dict]:
  """Returns means over seeds: of each arm and budget what the policy and its controls save and lose; of fixed counts.

  `proves`: the case says something, since random and equal counts of the policy's mean lose more than `LOSES`, and one
  expert more than `APART`.
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
      row["proves"] = min(row["random_rise"], row["alike_rise"]) > LOSES and row["one_expert_rise"] > APART
      rows.append(row)
  return rows


if __name__ == "__main__":
  program.run(main, FLAGS)
