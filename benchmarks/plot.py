"""Step time against the experts that were actually used."""

import numpy as np

from benchmarks.measure import Result
from moe_lab.report.charts import Series, line_chart
from moe_lab.report.page import escape, figure, page


def fitted(results: list[Result]) -> tuple[float, float, float] | None:
  """Returns intercept (seconds), slope (seconds per expert) and R^2 of our step times; None below three cases."""
  points = [(r.numbers["mean_experts"], r.seconds) for r in results if "mean_experts" in r.numbers]
  if len({round(experts) for experts, _ in points}) < 3:  # methods compared at one mean make no line
    return None
  experts, seconds = np.array(sorted(points)).T
  slope, intercept = np.polyfit(experts, seconds, 1)
  residual = seconds - (intercept + slope * experts)
  return float(intercept), float(slope), float(1 - residual.var() / seconds.var())


def time_by_experts(results: list[Result]) -> str:
  """Returns an SVG of our step times with their straight line; "" where there are too few cases."""
  ours = [r for r in results if r.side == "ours"]
  line = fitted(ours)
  if line is None:
    return ""
  intercept, slope, fit = line
  points = sorted((r.numbers["mean_experts"], r.seconds * 1e3) for r in ours)
  ends = [(x, (intercept + slope * x) * 1e3) for x in (0.0, points[-1][0])]
  return line_chart(
    [
      Series("measured", points, 1, "dots"),
      Series(f"{intercept * 1e3:.0f} ms + {slope * 1e3:.0f} ms per expert (R² {fit:.4f})", ends, 2, "dashed"),
    ],
    title="Step time against mean experts per token",
    x_label="mean experts per token",
    y_label="ms per step",
    include_zero=True,
  )


def page_of(drawing: str, table: str, command: str) -> str:
  """Returns a page that shows a drawing with its table and command; "" without a drawing."""
  if not drawing:
    return ""
  body = figure(drawing, "Ours; the line is fitted to the medians.") + f"<pre>{escape(table)}</pre>"
  return page("Step time against experts", f"<p><code>{escape(command)}</code></p>", [("Time", body)])
