"""The sections of a run's page that show training over time."""

from collections.abc import Sequence

from moe_lab.report.charts import Point, Series, line_chart
from moe_lab.report.numbers import is_number
from moe_lab.report.page import figure, note


def loss_section(train: Sequence[dict], evals: Sequence[dict], bigram: float | None) -> str:
  """Returns loss against tokens and against compute.

  Args:
    train: train records, by step.
    evals: eval records, by step.
    bigram: loss of the bigram baseline in nats per token, if known.
  """
  body = ""
  for key, label in (("tokens", "training tokens"), ("flops", "training compute, FLOPs")):
    raw, held_out = _points(train, key, "loss"), _points(evals, key, "val_loss")
    smooth = _smoothed(raw)
    series = [Series("train, smoothed", smooth, 1), Series("validation", held_out, 2, "dots")]
    if len(raw) > 1:
      series.insert(0, Series("train", raw, 1, "faint"))
    ends = [x for x, _ in raw + held_out]
    if is_number(bigram) and ends:
      series.append(Series("bigram baseline", [(min(ends), bigram), (max(ends), bigram)], 3, "dashed"))
    drawing = line_chart(
      series, title=f"Loss in nats per token against {label}", x_label=label, y_label="loss, nats/token"
    )
    body += figure(drawing, f"Against {label}. Lower is better.")
  return f'<div class="pair">{body}</div>' if body else note("No loss has been recorded yet.")


def budget_section(train: Sequence[dict], evals: Sequence[dict]) -> str:
  """Returns experts per token against the budget, the price that holds them there, and the policy's entropy."""
  label = "training tokens"
  experts = line_chart(
    [
      Series("sampled (training)", _points(train, "tokens", "mean_experts"), 1),
      Series("greedy (training text)", _points(train, "tokens", "greedy_experts"), 2),
      Series("greedy (validation)", _points(evals, "tokens", "mean_experts"), 4, "dots"),
      Series("budget", _points(train, "tokens", "budget"), 3, "dashed"),
    ],
    title="Mean experts per token and layer, and the budget, against training tokens",
    x_label=label,
    y_label="experts per token",
  )
  if not experts:
    return note("No expert counts have been recorded yet.")
  price = line_chart(
    [Series("price λ", _points(train, "tokens", "price"), 1)],
    title="Price of an expert against training tokens",
    x_label=label,
    y_label="nats/expert",
    include_zero=True,
    height=150,
  )
  entropy = line_chart(
    [Series("policy entropy", _points(train, "tokens", "policy_entropy"), 1)],
    title="Entropy of the count policy against training tokens",
    x_label=label,
    y_label="nats",
    include_zero=True,
  )
  below = figure(price, "The price λ that the controller asks for an expert to hold the budget.")
  beside = figure(entropy, "Entropy of the count policy: near zero it no longer explores.")
  if not below and not beside:
    beside = note("No price or policy entropy was recorded: the counts of this run are not learned.")
  return (
    f'<div class="pair"><div>{figure(experts, "Experts per token, mean over tokens and layers.")}{below}</div>'
    f"<div>{beside}</div></div>"
  )


def _points(records: Sequence[dict], x: str, y: str) -> list[Point]:
  return [(record[x], record[y]) for record in records if is_number(record.get(x)) and is_number(record.get(y))]


def _smoothed(points: Sequence[Point]) -> list[Point]:
  """Returns a running mean over about a fortieth of the points: noise goes, the curve stays."""
  half = len(points) // 80
  sums = [0.0]
  for _, y in points:
    sums.append(sums[-1] + y)
  out = []
  for index, (x, _) in enumerate(points):
    # Narrower toward the ends, else the first, steep part would be dragged down.
    reach = min(half, index, len(points) - 1 - index)
    out.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
  return out
