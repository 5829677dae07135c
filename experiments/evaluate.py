"""Evaluates the checkpoint of a run: on held-out documents, or by a suite of tasks.

    python -m experiments.evaluate --workdir=runs/quickstart --split=test --budget=3
    python -m experiments.evaluate --workdir=runs/any --suite=small --budgets=1,2,4
    python -m experiments.evaluate --workdir=runs/any --suite=reference --data=FOLDER --retrieve=FOLDER

Dropless, greedy counts; the result is the last line on stdout. A suite's is in
WORKDIR/suite-NAME.json and .html too; what an earlier checkpoint or other
settings gave is kept beside it.
"""

import hashlib
import os
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError, did_you_mean, require

FLAGS = flags.FlagValues()
flags.DEFINE_string("split", "test", "Which documents: train, validation or test.", flag_values=FLAGS)
flags.DEFINE_float("budget", None, "Mean experts to ask for; by default the trained budget.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.", flag_values=FLAGS)
flags.DEFINE_string(
  "suite",
  None,
  "Tasks to ask: small (made here, nothing is downloaded), reference (MMLU, GSM8K, HellaSwag, HumanEval), or a folder.",
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "data",
  None,
  "With --suite=reference: its data, by default from the hub. With small: where to keep it.",
  flag_values=FLAGS,
)
flags.DEFINE_list("tasks", [], "With --suite: only these of its tasks.", flag_values=FLAGS)
flags.DEFINE_integer("limit", None, "With --suite: items of each task.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list(
  "budgets",
  [],
  "With --suite: mean experts to ask for, one after the other; by default the trained budget.",
  flag_values=FLAGS,
)
flags.DEFINE_integer("slots", 8, "With --suite: sequences at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
  "context",
  2048,
  "With --suite: tokens of a sequence; a longer one loses its beginning.",
  lower_bound=2,
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "retrieve",
  None,
  "With --suite: a folder of texts; everything is asked again with passages found in it.",
  flag_values=FLAGS,
)

_OF_DOCUMENTS = ("split", "budget")
_OF_SUITES = ("data", "tasks", "limit", "budgets", "slots", "context", "retrieve")
_SUITES = ("small", "reference")


def main(workdir: Path) -> dict:
  """Returns the evaluation of the newest (or the asked) checkpoint in `workdir`."""
  for name in _OF_SUITES if FLAGS.suite is None else _OF_DOCUMENTS:
    if FLAGS[name].present:
      raise UserError(f"--{name}={FLAGS[name].value}: wanted with{'' if name in _OF_SUITES else 'out'} --suite only")
  return _documents(workdir) if FLAGS.suite is None else _suite(workdir)


def _documents(workdir: Path) -> dict:
  from moe_lab.data.loader import open_data
  from moe_lab.evaluate.held_out import SHORT, held_out_report
  from moe_lab.evaluate.perplexity import make_eval_step
  from moe_lab.train.load import load_model

  if FLAGS.split not in SHORT:
    raise UserError(f"--split={FLAGS.split}: wanted one of {', '.join(SHORT)}{did_you_mean(FLAGS.split, SHORT)}")
  loaded = load_model(workdir, FLAGS.step, FLAGS.budget)
  data = open_data(loaded.config.data, program.cache_dir())
  loaded.check_fingerprint(data.fingerprint)
  report = held_out_report(
    loaded.config,
    data,
    make_eval_step(loaded.config, loaded.model),
    loaded.params,
    loaded.router_state,
    lambda text: print(text, file=sys.stderr, flush=True),
    budget=loaded.budget,
    splits=(FLAGS.split,),
  )
  del report["passage"]
  return report | {"step": loaded.step, "workdir": workdir}


def _suite(workdir: Path) -> dict:
  budgets = [_number(text) for text in FLAGS.budgets]
  name = _name()

  from moe_lab.evaluate import suite
  from moe_lab.evaluate.passages import SHOWN, Passages
  from moe_lab.evaluate.scoring import Scorer
  from moe_lab.io.record import code
  from moe_lab.report.suite_page import write_suite
  from moe_lab.train.load import checked_budget, load_text_model

  model = load_text_model(workdir, FLAGS.step)
  config = model.loaded.config
  budgets = [checked_budget(config, budget, "--budgets") for budget in budgets or [None]]
  tasks = _tasks()
  passages = Passages(Path(FLAGS.retrieve).expanduser()) if FLAGS.retrieve else None
  scorer = Scorer(
    config, model.tokenizer, lambda tokens: model.engine(slots=FLAGS.slots, capacity=tokens), FLAGS.context
  )
  found = suite.run(tasks, scorer, budgets, passages)
  record = {
    "suite": name,
    "step": model.loaded.step,
    "method": config.routing.method,
    "trained_budget": model.loaded.budget,
    "budgets": budgets,
    "limit": FLAGS.limit,
    "context": FLAGS.context,
    "retrieve": passages and {"folder": FLAGS.retrieve, "passages": passages.number, "shown": SHOWN},
    "command": " ".join(sys.argv),
    "code": code()["git_hash"],
  } | found
  files = write_suite(workdir, record)
  return _short(record) | files | {"suite": name, "step": model.loaded.step, "workdir": workdir}


def _number(text: str) -> float:
  try:
    return float(text)
  except ValueError:
    raise UserError(f"--budgets={text}: wanted a number, or several: 1,2,4") from None


def _name() -> str:
  """Returns the suite's name, by which its files are known."""
  if FLAGS.suite in _SUITES:
    return FLAGS.suite
  folder = Path(FLAGS.suite).expanduser()
  if not folder.is_dir():
    raise UserError(
      f"--suite={FLAGS.suite}: wanted {', '.join(_SUITES)} or a folder of tasks{did_you_mean(FLAGS.suite, _SUITES)}"
    )
  if FLAGS.data is not None:
    raise UserError(f"--data={FLAGS.data}: wanted with --suite={' or '.join(_SUITES)} only")
  name = folder.resolve().name
  if name in _SUITES or not name:
    raise UserError(f"--suite={FLAGS.suite}: wanted a folder with a name of its own, not {', '.join(_SUITES)}")
  return name


def _tasks() -> list:
  data = Path(FLAGS.data).expanduser() if FLAGS.data else None
  if FLAGS.suite == "reference":
    require("lm_eval", "--suite=reference", "eval")
    # Read when the libraries are imported: no bars, a message a task and budget says enough; and no look at the hub.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if data:
      os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from moe_lab.evaluate import reference

    return reference.load(data, FLAGS.tasks, FLAGS.limit)
  from moe_lab.evaluate import json_tasks

  folder = Path(FLAGS.suite).expanduser()
  if FLAGS.suite == "small":
    from moe_lab.evaluate.offline import write_suite

    # Other code makes other items, and has another place for them.
    folder = data or program.cache_dir() / "suites" / f"small-{_made_by()}"
    if not (folder / "manifest.json").is_file():
      write_suite(folder)
  return json_tasks.load(folder, FLAGS.tasks, FLAGS.limit)


def _made_by() -> str:
  """Returns a hash of the code that makes the small suite."""
  from moe_lab.evaluate import offline, tasks

  files = [Path(offline.__file__), *sorted(Path(tasks.__file__).parent.glob("*.py"))]
  return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _short(record: dict) -> dict:
  """Returns what the last line says of each task and budget."""
  keys = ("value", "stderr", "items", "mean_experts", "flops_per_token")
  tasks = {}
  for name, task in record["tasks"].items():
    rows = [
      {"budget": row["budget"]}
      | {key: row[key] for key in keys}
      | ({"retrieved": {key: row["retrieved"][key] for key in keys}} if "retrieved" in row else {})
      for row in task["by_budget"]
    ]
    tasks[name] = {"skipped": task["skipped"]} if "skipped" in task else {"metric": task["metric"], "by_budget": rows}
  return {"tasks": tasks}


if __name__ == "__main__":
  program.run(main, FLAGS, one_arena=False)
