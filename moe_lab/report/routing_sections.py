"""The sections of a run's page that show where the experts went."""

from collections.abc import Sequence

from moe_lab.report.charts import heat_map, shares_chart
from moe_lab.report.numbers import is_number, mean, number, scaled
from moe_lab.report.page import escape, figure, note, table
from moe_lab.report.palette import LEVELS

_DEAD = 0.01  # of the mean load: an expert below it does nothing


def counts_section(held_out: Sequence | None, sampled: Sequence | None) -> str:
  """Returns how many experts the tokens of each layer got.

  Args:
    held_out: [Z][counts 0..K] shares under the greedy rule on held-out text, or None.
    sampled: the same of the last training record.
  """
  body = ""
  for rows, where in (
    (held_out, "held-out text, greedy counts"),
    (sampled, "training text, last record, sampled counts"),
  ):
    if rows:
      body += figure(
        shares_chart(rows, title=f"Share of tokens by number of experts, per layer: {where}"),
        f"Share of tokens by number of experts: {where}.",
      )
  return f'<div class="pair">{body}</div>' if body else note("No counts per layer have been recorded.")


def load_section(load: Sequence[Sequence[float]] | None, where: str) -> str:
  """Returns how evenly the experts of each layer are used.

  Args:
    load: [Z][E] shares of a layer's assignments; an empty row for a dense layer.
    where: which text and counts these are of.
  """
  rows = [[share * len(row) / sum(row) for share in row] if sum(row) > 0 else [] for row in load or []]
  full = [row for row in rows if row]
  if not full:
    return note("No expert load has been recorded.")
  top = max(2.0, min(max(map(max, full)), 4.0))
  drawing = heat_map(rows, title="Load of each expert over the mean load of its layer", top=top)
  ramp = "".join(f'<u class="v{index}"></u>' for index in range(LEVELS))
  more = " or more" if max(map(max, full)) > top else ""
  legend = f'<p class="ramp">0<b aria-hidden="true">{ramp}</b>{top:.1f}{more} times the mean load</p>'
  lines = []
  for layer, row in enumerate(rows):
    if row:
      dead = [str(expert) for expert, value in enumerate(row) if value < _DEAD]
      names = f" ({', '.join(dead[:8])}{', ...' if dead[8:] else ''})" if dead else ""
      lines.append([str(layer), number(max(row)), str(row.index(max(row))), number(min(row)), f"{len(dead)}{names}"])
  numbers = table(
    ["layer", "max/mean load", "busiest expert", "min/mean load", "dead experts"],
    lines,
    caption=f"1.00 is even. Dead: below {_DEAD:.0%} of the mean load.",
  )
  return (
    f'<div class="pair"><div>{figure(drawing, f"Assignments per expert: {where}.")}{legend}</div>'
    f"<div>{numbers}</div></div>"
  )


def class_section(by_class: dict | None) -> str:
  """Returns the table of token classes: {name: {"tokens", "loss" (nats), "mean_experts"}}."""
  if not by_class:
    return note("No breakdown by token class: the evaluation at the end of training writes it.")
  total = sum(entry["tokens"] for entry in by_class.values() if is_number(entry.get("tokens")))
  most = max((e["mean_experts"] for e in by_class.values() if is_number(e.get("mean_experts"))), default=1) or 1
  rows = []
  for name, entry in sorted(by_class.items(), key=lambda item: -(item[1].get("mean_experts") or 0)):
    tokens, experts = entry.get("tokens"), entry.get("mean_experts")
    share = f"{tokens / total:.1%}" if is_number(tokens) and total else "–"
    bar = f'<span class="bar" style="width:{experts / most * 7:.2f}rem"></span>' if is_number(experts) else ""
    rows.append(
      [
        escape(name),
        f'<span aria-hidden="true">{bar}</span>',
        number(experts),
        number(entry.get("loss"), 3),
        scaled(tokens),
        share,
      ]
    )
  return table(
    ["class of token", "", "mean experts", "loss, nats/token", "tokens", "share"],
    rows,
    text_columns=2,
    caption="Held-out tokens; experts per token and layer, by the greedy rule.",
  )


def last_with(records: Sequence[dict], key: str) -> object | None:
  """Returns the newest record's value of `key`, where any has one."""
  return next((record[key] for record in reversed(records) if record.get(key)), None)


def recent_mean(records: Sequence[dict], key: str) -> float | None:
  """Returns the mean of `key` over the last tenth of the records."""
  values = [record[key] for record in records if is_number(record.get(key))]
  return mean(values[-max(1, len(values) // 10) :]) if values else None
