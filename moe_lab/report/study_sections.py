"""The sections of a study's page that answer one question each: budgets, savings, removal, dense models."""

from collections.abc import Sequence

from moe_lab.report.numbers import is_number, number, plus_minus, scaled
from moe_lab.report.page import escape, note, table


def budgets_section(entries: Sequence[dict]) -> str:
  """Returns how one checkpoint holds each budget, beside a model trained for that budget alone."""
  if not entries:
    return note("No run was measured at several budgets.")
  lines = [
    [
      escape(entry["corpus"]),
      escape(entry["arm"]),
      number(entry["budget"]),
      number(entry["realised"], 3),
      number(entry["loss"], 4),
      number(entry["loss_alone"], 4),
      number(entry["loss_ratio"], 4),
      {True: "yes", False: "no", None: "–"}[entry["holds"]],
    ]
    for entry in entries
  ]
  return table(
    ["corpus", "arm", "budget", "realised", "loss", "loss, trained for it alone", "ratio", "holds"],
    lines,
    text_columns=2,
    caption="Holds: the realised mean within 3% of the budget, the loss at most 1% above that model's.",
  )


def needed_section(entries: Sequence[dict]) -> str:
  """Returns the activated experts that each method needs to reach fixed k_max / 2."""
  if not entries:
    return note("This takes fixed k_max / 2 and k_max / 4 and a method at several budgets.")
  lines = [
    [
      escape(entry["corpus"]),
      escape(entry["family"]),
      number(entry["reference"], 0),
      f"{entry['gain']:.2%}" + (" (saturated: proves nothing)" if entry["saturated"] else ""),
      ", ".join(number(value) for value in entry["needed"].values()),
      number(entry["mean_needed"]),
      f"{entry['saved']:.1%}" if is_number(entry["saved"]) else "not reached",
    ]
    for entry in entries
  ]
  return table(
    ["corpus", "method", "reference k", "gain of k_max/2 over k_max/4", "experts needed, by seed", "mean", "saved"],
    lines,
    text_columns=2,
    caption="Mean experts at which a method's curve over its budgets reaches the loss of the reference, same seed.",
  )


def removal_section(entries: Sequence[dict]) -> str:
  """Returns how far the loss rises without the expert that is missed most."""
  if not entries:
    return note("No run was measured without each of its experts.")
  lines = [
    [
      escape(entry["corpus"]),
      escape(entry["arm"]),
      plus_minus(entry["loss"], 4),
      plus_minus(entry["max_rise"], 4),
      plus_minus(entry["mean_rise"], 4),
      plus_minus(entry["max_over_mean_load"], 2),
    ]
    for entry in entries
  ]
  return table(
    ["corpus", "arm", "loss", "largest rise, nats", "mean rise, nats", "max/mean load"],
    lines,
    text_columns=2,
    caption="The rise in held-out loss when one expert of one layer is removed: the largest, and the mean over all.",
  )


def dense_section(entries: Sequence[dict], fits: Sequence[dict]) -> str:
  """Returns compute at equal loss, dense over ours, and the power laws."""
  if not entries and not fits:
    return note("The sweep has no dense models.")
  lines = [
    [
      escape(entry["corpus"]),
      escape(entry["arm"]),
      scaled(entry["parameters"]),
      *(_times(entry[key]) for key in ("flops_ratio", "tokens_ratio", "seconds_ratio")),
    ]
    for entry in entries
  ]
  body = table(
    ["corpus", "arm", "total parameters", "FLOPs/token", "training tokens", "training seconds"],
    lines,
    text_columns=2,
    caption="What dense models take over what the arm takes, at equal held-out loss; a dash: the curves do not meet.",
  ) if lines else ""  # fmt: skip
  lines = [
    [
      escape(fit["corpus"]),
      escape(fit["family"]),
      str(fit["models"]),
      _interval(fit["alpha"]),
      _interval(fit["beta"]),
      f"{fit['residual']:.2%}",
    ]
    for fit in fits
  ]
  return body + (
    table(
      ["corpus", "models", "number", "exponent of FLOPs per token", "exponent of parameters", "residual"],
      lines,
      text_columns=2,
      caption="Loss = exp(a) / (FLOPs^alpha parameters^beta), least squares in logarithms, 90% bootstrap intervals.",
    )
    if lines
    else ""
  )


def _times(ratio: float | None) -> str:
  return f"{ratio:.2f} ×" if is_number(ratio) else "–"


def _interval(entry: dict | None) -> str:
  if entry is None:
    return "–"
  return f"{entry['value']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]"
