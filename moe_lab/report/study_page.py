"""The page of a routing study: every method on the same axes, one file that opens offline."""

from collections.abc import Sequence

from moe_lab.report.numbers import is_number, number, plus_minus, scaled
from moe_lab.report.page import escape, figure, note, page, table
from moe_lab.report.palette import level
from moe_lab.report.scatter import Family, Mark, scatter_chart
from moe_lab.report.study_sections import budgets_section, dense_section, needed_section, removal_section

_AXES = (
  ("flops_per_token", "Loss against compute per token", "FLOPs per token, at the measured mean experts"),
  ("training_flops", "Loss against training compute", "training FLOPs, second rollouts counted"),
  ("training_seconds", "Loss against wall clock", "seconds of training at the median speed"),
)


def study_page(study: dict) -> str:
  """Returns the document.

  Args:
    study: what experiments/routing_study/study.py puts together: "arms", "comparisons", and the analyses, whose entries
      name their "corpus".
  """
  rows = study["arms"]
  corpora = list(dict.fromkeys(row["corpus"] for row in rows))
  families = list(dict.fromkeys(row["family"] for row in rows))
  sections = []
  for key, heading, label in _AXES:
    charts = "".join(_scatter(rows, corpus, key, label, families) for corpus in corpora)
    sections.append((heading, f'<div class="pair">{charts}</div>' if charts else note("No run is finished yet.")))
  sections += [
    ("Ours against its controls", _comparisons(study["comparisons"])),
    ("Experts by class of token", _classes(rows, corpora, "mean_experts", 2)),
    ("Loss by class of token", _classes(rows, corpora, "loss", 3)),
    ("Which experts: load", _load(rows)),
    ("Alarms", _alarms(rows)),
    ("One checkpoint, many budgets", budgets_section(study["conditioned"])),
    ("Experts needed to reach half of k_max", needed_section(study["experts_needed"])),
    ("When one expert is removed", removal_section(study["removals"])),
    ("Against dense models", dense_section(study["against_dense"], study["scaling"])),
    ("All numbers", _numbers(rows)),
    ("How it was made", _origin(study)),
  ]
  return page("moe_lab: routing study", _head(study, corpora), sections)


def _head(study: dict, corpora: Sequence[str]) -> str:
  failed = [run["name"] for run in study["runs"] if run["failed"]]
  about = [
    f"{study['split']} split",
    f"{len(study['runs'])} runs",
    f"corpora: {', '.join(corpora) or 'none'}",
    *([f"failed: {', '.join(failed)}"] if failed else []),
  ]
  return f'<p class="soft">{escape(" · ".join(about))}</p>'


def _scatter(rows: Sequence[dict], corpus: str, key: str, label: str, families: Sequence[str]) -> str:
  drawn = []
  for index, family in enumerate(families):
    members = [row for row in rows if row["corpus"] == corpus and row["family"] == family and row[key] and row["loss"]]
    marks = [Mark(row[key]["mean"], row["loss"]["mean"], row["loss"]["spread"], _tip(row, key)) for row in members]
    drawn.append(Family(family, marks, index))
  drawing = scatter_chart(
    drawn, title=f"Held-out loss on {corpus} against {label}", x_label=label, y_label="loss, nats/token"
  )
  return figure(drawing, f"{corpus}. Lower and further left is better; bars are the spread over seeds.")


def _tip(row: dict, key: str) -> str:
  return (
    f"{row['arm']}: loss {plus_minus(row['loss'], 4)}, {scaled(row[key]['mean'])}, "
    f"{plus_minus(row['mean_experts'], 2)} experts, {len(row['seeds'])} seeds"
  )


def _comparisons(entries: Sequence[dict]) -> str:
  if not entries:
    return note("Nothing of ours is finished together with a control.")
  lines = []
  for entry in entries:
    if entry["bound"]:
      verdict = "upper bound"
    elif not entry["by_seed"]:
      verdict = "control failed"
    elif not entry["matched"]:
      verdict = "FLOPs differ"
    elif len(entry["by_seed"]) < entry["seeds"]:
      verdict = "seeds missing"
    else:
      verdict = "<b>win</b>" if entry["win"] else "no"
    signs = ", ".join(number(difference, 4) for difference in entry["by_seed"].values())
    lines.append(
      [
        escape(entry["corpus"]),
        escape(entry["arm"]),
        escape(entry["control"]),
        verdict,
        number(entry["mean"], 4),
        number(entry["standard_error"], 4),
        signs,
        number(entry["flops_ratio"], 3),
        number(entry["training_flops_ratio"], 3),
      ]
    )
  head = ["corpus", "ours", "control", "verdict", "difference, nats", "standard error", "by seed"]
  return table(
    [*head, "FLOPs/token", "training FLOPs"],
    lines,
    text_columns=4,
    caption="Loss of ours minus loss of the control, paired by seed: negative is better. A win is below zero on every "
    "seed and above two standard errors, at FLOPs per token within 2%. Last two columns: ours over the control.",
  )


def _classes(rows: Sequence[dict], corpora: Sequence[str], key: str, digits: int) -> str:
  body = ""
  for corpus in corpora:
    members = [row for row in rows if row["corpus"] == corpus]
    names = list(dict.fromkeys(name for row in members for name in row["by_class"]))
    lines = []
    for row in members:
      values = [row["by_class"].get(name, {}).get(key) for name in names]
      lines.append([escape(row["arm"]), *_shaded(values, digits)])
    body += table(["arm", *names], lines, caption=f"{corpus}: mean over seeds, by the class of the predicted token.")
  return body or note("No run is finished yet.")


def _shaded(values: Sequence[float | None], digits: int) -> list[str]:
  """Returns cells whose ground tells where a value stands between the least and the most of its row."""
  known = [value for value in values if is_number(value)]
  low, high = min(known, default=0), max(known, default=0)

  def cell(value: float | None) -> str:
    if not is_number(value):
      return number(None)
    shade = level((value - low) / (high - low) if high > low else 0)
    return f'<span class="t{shade}">&nbsp;{number(value, digits)}&nbsp;</span>'

  return [cell(value) for value in values]


def _load(rows: Sequence[dict]) -> str:
  lines = [
    [
      escape(row["corpus"]),
      escape(row["arm"]),
      " ".join(f"{value:.2f}" for value in row["max_over_mean_load"]),
      " ".join(str(count) for count in row["dead_experts"]),
    ]
    for row in rows
  ]
  return table(
    ["corpus", "arm", "max/mean load, by layer", "dead experts, by layer"],
    lines,
    text_columns=2,
    caption="Max/mean load: mean over seeds; 1.00 is even. Dead: under 1% of the mean load; the most of any seed.",
  )


def _alarms(rows: Sequence[dict]) -> str:
  lines = [
    [escape(row["corpus"]), escape(row["arm"]), escape(seed), escape("; ".join(found))]
    for row in rows
    for seed, found in row["alarms"].items()
  ]
  return table(["corpus", "arm", "seed", "alarm"], lines, text_columns=4) if lines else note("None.")


def _numbers(rows: Sequence[dict]) -> str:
  lines = [
    [
      escape(row["corpus"]),
      escape(row["arm"]),
      ", ".join(escape(seed) for seed in row["seeds"]),
      plus_minus(row["loss"], 4),
      plus_minus(row["bits_per_byte"], 4),
      plus_minus(row["mean_experts"], 3),
      scaled(row["flops_per_token"]["mean"]),
      scaled(row["training_flops"]["mean"]),
      scaled(row["training_tokens"]["mean"]),
      number(row["training_seconds"]["mean"], 0),
      scaled(row["parameters"]),
    ]
    for row in rows
  ]
  head = ["corpus", "arm", "seeds", "loss", "bits/byte", "experts", "FLOPs/token", "training FLOPs", "tokens"]
  caption = "Mean ± standard deviation over seeds."
  return table([*head, "seconds", "parameters"], lines, text_columns=3, caption=caption)


def _origin(study: dict) -> str:
  body = f"<p>Command <code>{escape(study['command'])}</code></p><p>Sweep <code>{escape(study['sweep'])}</code></p>"
  failed = [[escape(run["name"]), escape(run["failed"])] for run in study["runs"] if run["failed"]]
  return body + (table(["failed run", "why"], failed, text_columns=2) if failed else "")
