"""The section of a run's page that says what making it of another run changed."""

from collections.abc import Mapping

from moe_lab.report.numbers import is_number, number
from moe_lab.report.page import escape, table

_FEWER = {  # of "fewer_experts": whose counts
  "full": "the base's count",
  "policy": "the policy's",
  "alike": "the same for each token",
  "random": "by chance",
  "fixed": "fixed",
}


def adaptation_section(report: Mapping) -> str:
  """Returns the tables of adaptation.json: drift from the base, what fewer experts cost, and its other numbers."""
  drifts = {name: value for name, value in report.items() if name.startswith("drift") and isinstance(value, Mapping)}
  body = _drift_table(drifts) if drifts else ""
  if isinstance(fewer := report.get("fewer_experts"), Mapping):
    body += _fewer_table(fewer)
  others = _plain_numbers({name: value for name, value in report.items() if name not in (*drifts, "fewer_experts")})
  return body + (
    table(["number", "value"], [[escape(name), _exact(value)] for name, value in others]) if others else ""
  )


def _drift_table(drifts: Mapping[str, Mapping]) -> str:
  names = list(dict.fromkeys(name for drift in drifts.values() for name in drift))
  rows = [
    [escape(name.replace("_", " ")), *(_exact(drift.get(name)) for drift in drifts.values())]
    for name in names
    if any(is_number(drift.get(name)) for drift in drifts.values())
  ]
  columns = [name.removeprefix("drift").strip("_") or "held-out text" for name in drifts]
  caption = "Against the base, on held-out text. Flips: share of tokens of a layer whose set of experts changed."
  return table(["drift", *columns], rows, caption=caption)


def _fewer_table(fewer: Mapping) -> str:
  rows = [
    [escape(words), _exact(row.get("budget")), number(row.get("experts")), number(row.get("loss"), 4)]
    + [f"{row[key]:+.2%}" if is_number(row.get(key)) else "–" for key in ("saved", "rise")]
    for name, words in _FEWER.items()
    for row in ([fewer[name]] if isinstance(fewer.get(name), Mapping) else fewer.get(name, []))
  ]
  head = ["counts", "budget", "experts", "loss, nats/token", "fewer experts", "higher loss"]
  return table(head, rows, caption="What fewer experts cost, on the validation split.")


def _plain_numbers(report: Mapping, prefix: str = "") -> list[tuple[str, float]]:
  """Returns (name, value) of all numbers, those of nested objects by both names."""
  found = []
  for name, value in report.items():
    words = prefix + name.replace("_", " ")
    if isinstance(value, Mapping):
      found += _plain_numbers(value, f"{words}: ")
    elif is_number(value):
      found.append((words, value))
  return found


def _exact(value: object) -> str:
  if not is_number(value):
    return "–"
  return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
