"""How far does a model retrieve that was trained at 1K tokens? Modified ALiBi beside plain ALiBi and rotary.

    python -m experiments.retrieval.study --workdir=runs/retrieval

Trains the arms of configs/retrieval.py for each seed (what is trained already
is taken as it is) and asks each at rows of 1K to 16K tokens: as trained, with
positions interpolated back to the trained length, and with the logits of groups
without a slope sharpened. What was measured already is kept in the run's folder.
Table and curves go to WORKDIR/study.html and study.json; the last line on stdout
is the JSON result.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError, did_you_mean

CONFIG = Path(__file__).parents[2] / "configs/retrieval.py"
ARMS = ("modified", "plain", "rotary")
LENGTHS = {1024: 64, 2048: 32, 4096: 32, 8192: 12, 16_384: 8}  # tokens of a row, and how many rows

FLAGS = flags.FlagValues()
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to train.", flag_values=FLAGS)
flags.DEFINE_list("arms", list(ARMS), "Arms of configs/retrieval.py.", flag_values=FLAGS)
flags.DEFINE_integer("longest", max(LENGTHS), "Rows up to this many tokens.", flag_values=FLAGS)
flags.DEFINE_enum(
  "split", "validation", ["validation", "test"], "Tune on validation; report, once, on test.", flag_values=FLAGS
)


def main(workdir: Path) -> dict:
  """Trains and asks all arms and seeds."""
  from experiments.retrieval import page
  from moe_lab.config.load import load
  from moe_lab.config.resolve import resolve
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.launch.local import stop_of
  from moe_lab.train.loop import train
  from moe_lab.train.signals import Preemption

  for arm in FLAGS.arms:
    if arm not in ARMS:
      raise UserError(f"--arms={arm}: wanted some of {', '.join(ARMS)}{did_you_mean(arm, ARMS)}")
  seeds = program.seeds(FLAGS.seeds)
  if FLAGS.longest < min(LENGTHS):
    raise UserError(f"--longest={FLAGS.longest}: wanted at least {min(LENGTHS)}, the trained length")
  configs = {arm: resolve(load(f"{CONFIG}:{arm}")) for arm in FLAGS.arms}
  runs = []
  with Preemption() as preemption:
    stop = stop_of(preemption)
    for arm, config in configs.items():
      for seed in seeds:
        folder = workdir / f"{arm}-{seed}"
        trained = train(config.with_seed(seed), folder, program.cache_dir(), sys.argv)
        runs.append({"arm": arm, "seed": seed, "val_loss": trained["val_loss"], "asked": _asked(folder, stop)})
        for one in runs[-1]["asked"]:
          print(f"{arm} {seed}: {_in_words(one)}", file=sys.stderr, flush=True)
  study = {"split": FLAGS.split, "runs": runs, "summary": _summary(runs)}
  write_text(workdir / "study.json", dump_json(study, indent=1) + "\n")
  write_text(
    workdir / "study.html",
    page.page_of(study["summary"], "python -m experiments.retrieval.study " + " ".join(sys.argv[1:])),
  )
  print(page.table(study["summary"]), file=sys.stderr)
  return {"split": FLAGS.split, "summary": study["summary"], "workdir": workdir}


def _asked(folder: Path, stop: Callable[[], None]) -> list[dict]:
  """Returns the answers of one run by length and way; what is kept in the folder is not asked again.

  `stop` is called before each question, and leaves after SIGTERM.
  """
  from experiments.retrieval.answers import WAYS, answered, longer
  from moe_lab.io.files import dump_json, write_text
  from moe_lab.train.load import load_model

  loaded = load_model(folder)
  trained_length = loaded.config.data.seq_len
  kept = folder / f"answers-{FLAGS.split}.json"
  found = json.loads(kept.read_text()) if kept.is_file() else []
  by_key = {(one["step"], one["length"], one["rows"], one["way"]): one for one in found}
  keys = [
    (loaded.step, length, rows, way)
    for length, rows in LENGTHS.items()
    for way in WAYS
    # What changes nothing, as interpolation at the trained length, is asked once.
    if way == WAYS[0] or longer(loaded.config.model, way, trained_length, length) != loaded.config.model
    if length <= FLAGS.longest
  ]
  for key in keys:
    if key not in by_key:
      stop()
      right = answered(loaded, program.cache_dir(), *key[1:], FLAGS.split)
      by_key[key] = dict(zip(("step", "length", "rows", "way"), key, strict=True)) | right
      write_text(kept, dump_json(list(by_key.values()), indent=1) + "\n")
  return [by_key[key] for key in keys]


def _in_words(one: dict) -> str:
  shares = ", ".join(f"{kind} {one[kind]['right']}/{one[kind]['asked']}" for kind in ("passkey", "multikey"))
  return f"{one['length']:,} tokens, {one['way']}: {shares}"


def _summary(runs: list[dict]) -> list[dict]:
  """Returns accuracy by arm, way and length: of each seed, and their mean.

  At the trained length nothing is interpolated.
  """
  from experiments.retrieval.answers import WAYS

  found: dict[tuple, dict] = {}
  for run in runs:
    for one in run["asked"]:
      both = one["length"] == min(LENGTHS) and one["way"] == WAYS[0]
      for way in WAYS[:2] if both else (one["way"],):
        key = (run["arm"], way, one["length"])
        entry = found.setdefault(key, dict(zip(("arm", "way", "length"), key, strict=True)) | {"by_seed": {}})
        entry["by_seed"][str(run["seed"])] = {
          kind: one[kind]["right"] / one[kind]["asked"] for kind in ("passkey", "multikey")
        }
  for entry in found.values():
    for kind in ("passkey", "multikey"):
      shares = [by_kind[kind] for by_kind in entry["by_seed"].values()]
      entry[kind] = sum(shares) / len(shares)
  return list(found.values())


if __name__ == "__main__":
  program.run(main, FLAGS)
