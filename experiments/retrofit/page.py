"""Loss against experts of a retrofitted model, drawn and as a table."""

import statistics

from moe_lab.report.charts import Series, line_chart
from moe_lab.report.page import escape, figure, page

CONTROLS = {"random": "the policy's counts, dealt out at random", "alike": "every token the mean"}


def in_words(found: dict) -> str:
  """Returns a run's trade as a line."""
  return "; ".join(f"{one['experts']:.2f} experts {one['rise']:+.2%}" for one in found["policy"])


def page_of(study: dict, command: str) -> str:
  """Returns the page of `study.json`'s content."""
  drawings = "".join(figure(_curve(study, arm), f"{arm}: means over seeds.") for arm in _arms(study["summary"]))
  body = f'<div class="pair">{drawings}</div><pre>{escape(table(study["summary"]))}</pre>'
  intro = f"<p><code>{escape(command)}</code></p>"
  return page("Fewer experts of a trained model", intro, [(f"Loss against experts, {study['split']} split", body)])


def _arms(summary: list[dict]) -> list[str]:
  return list(dict.fromkeys(row["arm"] for row in summary))


def _curve(study: dict, arm: str) -> str:
  rows = [row for row in study["summary"] if row["arm"] == arm]
  series = [Series("policy", sorted((row["policy_experts"], 100 * row["policy_rise"]) for row in rows), 1, "dots")]
  for color, (kind, words) in enumerate(CONTROLS.items(), 2):
    series.append(Series(words, sorted((row[f"{kind}_experts"], 100 * row[f"{kind}_rise"]) for row in rows), color))
  runs = [run for run in study["runs"] if run["arm"] == arm]
  fixed = [
    (float(index + 1), 100 * statistics.fmean(run["fixed"][index]["rise"] for run in runs))
    for index in range(len(runs[0]["fixed"]))
  ]
  series.append(Series("fixed counts", [*fixed, (runs[0]["full"]["experts"], 0.0)], 4, "dots"))
  return line_chart(
    series, title=arm, x_label="mean experts per token", y_label="rise of the loss, %", include_zero=True
  )


def table(summary: list[dict]) -> str:
  """Returns a line for each arm and budget: experts saved, and by how much the loss rises, also of the controls."""
  head = f"{'':24}{'budget':>7}{'experts':>9}{'saved':>7}{'loss':>8}  {'by seed':24}{'random':>8}{'alike':>8}{'k=1':>8}"
  lines = [head]
  for row in summary:
    seeds = " ".join(f"{rise:+.2%}" for rise in row["rise_by_seed"].values())
    lines.append(
      f"{row['arm']:24}{row['budget']:7.2f}{row['policy_experts']:9.2f}{row['policy_saved']:7.0%}"
      f"{row['policy_rise']:+8.2%}  {seeds:24}{row['random_rise']:+8.2%}{row['alike_rise']:+8.2%}"
      f"{row['one_expert_rise']:+8.2%}{'' if row['proves'] else '  (proves nothing)'}"
    )
  return "\n".join(lines)
