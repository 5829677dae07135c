"""Evaluates the checkpoint of a run on held-out documents.

    python -m experiments.evaluate --workdir=runs/quickstart --split=test --budget=3

Dropless, greedy counts; the result is the last line on stdout.
"""

from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError, did_you_mean

FLAGS = flags.FlagValues()
flags.DEFINE_string("split", "test", "Which documents: train, validation or test.", flag_values=FLAGS)
flags.DEFINE_float("budget", None, "Mean experts to ask for; by default the trained budget.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.", flag_values=FLAGS)


def main(workdir: Path) -> dict:
  """Returns the evaluation of the newest (or the asked) checkpoint in `workdir`."""
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
    loaded.config, data, make_eval_step(loaded.config, loaded.model), loaded.params, loaded.router_state,
    budget=loaded.budget, splits=(FLAGS.split,),
  )  # fmt: skip
  del report["passage"]
  return {"val_loss": report.pop(f"{SHORT[FLAGS.split]}_loss")} | report | {"step": loaded.step, "workdir": workdir}


if __name__ == "__main__":
  program.run(main, FLAGS)
