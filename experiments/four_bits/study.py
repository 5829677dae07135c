"""What do 4 bits cost a trained mixture of experts? int4 and NF4 side by side: loss, answers, the choice of experts.

    python -m experiments.four_bits.study --bases=runs/a,runs/b,runs/c --workdir=runs/four_bits --split=test

Each base is put into both kinds of 4 bits, calibrated on its first training batches, and compared with itself on
held-out text: bits a weight, rise of the loss, tokens whose experts change, and right answers of multiple choice items
that are built from that text (moe_lab/evaluate/choices.py). The table goes to stderr and study.json; the last line on
stdout is the JSON result.
"""

import statistics
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import modes, program
from moe_lab.errors import UserError

BOOKS = ("int4", "nf4")

FLAGS = flags.FlagValues()
flags.DEFINE_list("bases", [], "Folders of trained runs.", flag_values=FLAGS)
flags.DEFINE_integer("items", 1000, "Multiple choice items, at most.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("split", "validation", ["validation", "test"], "Of the held-out text.", flag_values=FLAGS)


def main(workdir: Path) -> dict:
  """Quantises and compares all bases."""
  from moe_lab.io.files import dump_json, write_text

  if not FLAGS.bases:
    raise UserError("--bases: wanted the folders of trained runs, as in --bases=runs/a,runs/b")
  rows = [row for folder in FLAGS.bases for row in _compared(Path(folder).expanduser())]
  summary = [_mean(rows, book) for book in BOOKS]
  workdir.mkdir(parents=True, exist_ok=True)
  write_text(
    workdir / "study.json", dump_json({"split": FLAGS.split, "rows": rows, "summary": summary}, indent=1) + "\n"
  )
  print(table(rows + summary), file=sys.stderr)
  return {"split": FLAGS.split, "summary": summary, "workdir": workdir}


def _compared(folder: Path) -> list[dict]:
  """Returns a row for each kind of 4 bits."""
  from moe_lab.adapt.quantise import calibrated
  from moe_lab.config.resolve import resolve
  from moe_lab.data.loader import open_data
  from moe_lab.evaluate.choices import choices
  from moe_lab.evaluate.drift import Routed, routing_drift
  from moe_lab.evaluate.perplexity import make_eval_step
  from moe_lab.nn.transformer import Transformer
  from moe_lab.train.adapted import calibration_batches, routed
  from moe_lab.train.base import check_readable, check_tokens, load_base

  base = load_base(folder)
  check_readable(base)
  config = modes.adapted("quantise", base.config, resolve(modes.begun("quantise", base.config, folder)), folder)
  data = open_data(config.data, program.cache_dir())
  check_tokens(base, config, data.fingerprint)
  eval_step, budget, size = (
    make_eval_step(config, Transformer(config)),
    config.routing.mean_count,
    config.train.batch_size,
  )

  def asked(model):
    return choices(eval_step, model, data.eval_batches(FLAGS.split, size), budget, FLAGS.items)

  before, rows = routed(base.state), []
  known = asked(before)
  for book in BOOKS:
    batches = calibration_batches(data, config)
    params, report = calibrated(base.config, base.state.params, base.state.router_state, batches, book)
    after = Routed(params, base.state.router_state)
    drift = routing_drift(config, before, after, data.eval_batches(FLAGS.split, size))
    answers = asked(after)
    fields = ("loss_before", "loss_after", "loss_rise", "flips", "jaccard", "count_drift")
    rows.append(
      {"base": folder.name, "book": book, "bits_per_weight": report["bits_per_weight"]}
      | {field: drift[field] for field in fields}
      | {"items": known["asked"], "accuracy_before": known["accuracy"], "accuracy_after": answers["accuracy"]}
    )
  return rows


def _mean(rows: list[dict], book: str) -> dict:
  """Returns the mean of one kind's rows."""
  of_book = [row for row in rows if row["book"] == book]
  numbers = [name for name, value in of_book[0].items() if not isinstance(value, str)]
  return {"base": "mean", "book": book} | {name: statistics.fmean(row[name] for row in of_book) for name in numbers}


def table(rows: list[dict]) -> str:
  """Returns a line for each row."""
  after = f"{'in 4 bits':>11}"
  head = f"{'':24}{'':6}{'bits':>6}{'loss':>8}{after}{'rise':>8}{'flips':>7}{'items':>7}{'right':>8}{after}"
  lines = [
    f"{row['base']:24}{row['book']:6}{row['bits_per_weight']:6.2f}{row['loss_before']:8.4f}{row['loss_after']:11.4f}"
    f"{row['loss_rise']:+8.2%}{row['flips']:7.1%}{row['items']:7.0f}{row['accuracy_before']:8.1%}{row['accuracy_after']:11.1%}"
    for row in rows
  ]
  return "\n".join([head, *lines])


if __name__ == "__main__":
  program.run(main, FLAGS)
