"""The page of one run: report.html, a single file that opens offline."""

import dataclasses
import json
import statistics
from pathlib import Path

from moe_lab.config import Config, diff
from moe_lab.errors import UserError
from moe_lab.io.progress import clock
from moe_lab.io.run import load_run
from moe_lab.io.writers import read_metrics
from moe_lab.report.adaptation_section import adaptation_section
from moe_lab.report.curves import budget_section, loss_section
from moe_lab.report.goodput import goodput
from moe_lab.report.numbers import is_number, number, scaled
from moe_lab.report.page import escape, note, page, table, write_page
from moe_lab.report.passage import passage
from moe_lab.report.routing_sections import class_section, counts_section, last_with, load_section, recent_mean
from moe_lab.report.suites import read_suites, suites_section
from moe_lab.strict_json import parse

_MAX_FILES = 200  # of the data manifest


def write_report(workdir: Path) -> Path:
  """Writes `workdir/report.html` from the run's records, and returns its path.

  What the run has not recorded (yet) is said in a sentence in its place.

  Raises:
    UserError: there is no run, or its records cannot be read.
    RunError: the page cannot be written.
  """
  workdir = Path(workdir)
  config, info = load_run(workdir)
  records = sorted(read_metrics(workdir), key=lambda record: record.get("step") or 0)
  train = [record for record in records if record.get("kind") == "train"]
  evals = [record for record in records if record.get("kind") == "eval"]
  final = _read_object(workdir / "evaluation.json")

  load, where = final.get("load"), "held-out text, greedy counts"
  if not load:
    load, where = last_with(train, "load"), "training text, last record"
  text = passage(final.get("passage") or [])
  sections = [
    ("Loss", loss_section(train, evals, final.get("bigram_loss"))),
    ("Experts against the budget", budget_section(train, evals)),
    ("How many experts, by layer", counts_section(final.get("k_histogram"), last_with(train, "k_histogram"))),
    ("Which experts: load", load_section(load, where)),
    ("By class of token", class_section(final.get("by_class"))),
    ("Where the experts went in a text", text or note("No passage: the evaluation at the end of training writes it.")),
  ]
  if adapted := _read_object(workdir / "adaptation.json"):
    sections.insert(0, ("Against the base", adaptation_section(adapted)))
  if suites := read_suites(workdir):
    sections.append(("Evaluation suites", suites_section(suites)))
  sections.append(("How it was made", _origin(config, info, train)))
  document = page(f"moe_lab run: {workdir.absolute().name}", _head(config, info, train, evals, final), sections)
  return write_page(workdir / "report.html", document)


def _head(config: Config, info: dict, train: list[dict], evals: list[dict], final: dict) -> str:
  """Returns the run in a line and its key numbers."""
  counts = "counts learned" if config.routing.learns_counts else f"counts by {config.routing.method}"
  devices = ", ".join(f"{d.get('count')} × {d.get('kind')}" for d in info.get("devices") or [])
  about = [
    str(info.get("started", ""))[:16].replace("T", " ") + " UTC",
    devices or "device unknown",
    f"{train[-1].get('step') if train else 0} of {config.train.steps} steps",
    f"{config.routing.k} experts for every token" if config.routing.fixed else counts,
  ]

  # The bigram beside a loss is of the same split: between splits the losses differ more than between models.
  short = next((short for short in ("test", "val") if is_number(final.get(f"{short}_loss"))), None)
  loss = final[f"{short}_loss"] if short else last_with(evals, "val_loss")
  split = {"test": "test", "val": "validation", None: "validation, while training"}[short]
  bits = final.get(f"{short}_bits_per_byte")
  bigram = "bigram_test" if short == "test" else "bigram"
  budget = final.get("budget", last_with(train, "budget"))
  greedy = final.get("mean_experts", last_with(evals, "mean_experts"))
  per_token = final.get("flops_per_token")
  speeds = [record["tokens_per_second"] for record in train if is_number(record.get("tokens_per_second"))]
  cards = [
    (f"held-out loss ({split})", number(loss, 3), "nats/token" + _and_bits(bits)),
    (
      f"bigram baseline ({split.partition(',')[0]})",
      number(final.get(f"{bigram}_loss"), 3),
      "nats/token" + _and_bits(final.get(f"{bigram}_bits_per_byte")),
    ),
    (
      "experts per token, greedy",
      number(greedy),
      "held-out" + (f"; budget {number(budget)}" if is_number(budget) else ""),
    ),
    ("experts per token, sampled", number(recent_mean(train, "mean_experts")), "training, last tenth"),
    (
      "training tokens",
      scaled(last_with(train, "tokens")),
      f"{scaled(statistics.median(speeds)) if speeds else '–'} tokens/s",
    ),
    (
      "training compute",
      scaled(last_with(train, "flops")),
      "FLOP" + (f" · {scaled(per_token, 'FLOP')}/token, held-out" if is_number(per_token) else ""),
    ),
  ]
  shown = "".join(
    f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(unit)}</dd></div>" for name, value, unit in cards
  )
  return f'<p class="soft">{escape(" · ".join(about))}</p><dl class="cards">{shown}</dl>'


def _and_bits(bits: object) -> str:
  return f" · {number(bits, 3)} bits/byte" if is_number(bits) else ""


def _origin(config: Config, info: dict, train: list[dict]) -> str:
  """Returns command, code, goodput, configuration, data and launches; the long ones folded."""
  commit = str(info.get("git_hash") or "unknown")[:12] + (" with uncommitted changes" if info.get("git_dirty") else "")
  body = f"<p>Command <code>{escape(info.get('command', 'unknown'))}</code></p>"
  tokenizer = str(info.get("tokenizer_fingerprint"))[:12]
  body += f"<p>Code <code>{escape(commit)}</code>, tokenizer <code>{escape(tokenizer)}</code></p>"

  if (spent := goodput(train, info)) is not None:
    body += f"<p>Goodput {spent.share:.0%}: of {clock(spent.elapsed)} since the first launch "
    body += f"{clock(spent.useful)} went into steps that count</p>"

  defaults = {field: default for field, default, _ in diff(Config(), config)}
  rows = [
    [
      f"<code>{section}.{name}</code>",
      _value(value),
      f"default {_value(defaults[f'{section}.{name}'])}" if f"{section}.{name}" in defaults else "",
    ]
    for section, fields in dataclasses.asdict(config).items()
    for name, value in fields.items()
  ]
  body += _folded("Configuration", table(["field", "value", "changed from"], rows, text_columns=3))

  files = [entry for entry in info.get("data") or [] if isinstance(entry, dict)]
  columns = list(dict.fromkeys(key for entry in files for key in entry))
  if columns:
    rows = [[_value(entry.get(key)) for key in columns] for entry in files[:_MAX_FILES]]
    left_out = note(f"and {len(files) - _MAX_FILES} more") if len(files) > _MAX_FILES else ""
    body += _folded(f"Data ({len(files)})", table(columns, rows, text_columns=len(columns)) + left_out)
  else:
    body += note("No data manifest.")

  rows = [
    [
      escape(launch.get("step")),
      escape(launch.get("started")),
      escape(launch.get("host")),
      escape(", ".join(f"{k} {v}" for k, v in (launch.get("versions") or {}).items() if v)),
    ]
    for launch in info.get("launches") or []
  ]
  return body + _folded(
    f"Launches ({len(rows)})", table(["from step", "started", "host", "versions"], rows, text_columns=4)
  )


def _folded(name: str, body: str) -> str:
  return f"<details><summary>{escape(name)}</summary>{body}</details>"


def _value(value: object) -> str:
  if isinstance(value, (dict, list, tuple)):
    value = json.dumps(value, ensure_ascii=False)
  text = "" if value is None else str(value)
  return escape(text if len(text) <= 200 else text[:200] + "...")


def _read_object(path: Path) -> dict:
  try:
    found = parse(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as err:
    raise UserError(f"{path} cannot be read: {err}") from err
  if not isinstance(found, dict):
    raise UserError(f"{path}: wanted an object")
  return found
