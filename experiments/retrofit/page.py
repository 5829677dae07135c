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
  arms = _arms(study["summary"])
  drawings = figure(_policies(study["summary"], arms), "The policies alone: means over seeds.")
  drawings += "".join(figure(_curve(study, arm), f"{arm}, and its controls: means over seeds.") for arm in arms)
  body = f'<div class="pair">{drawings}</div><pre>{escape(text(study))}</pre>'
  intro = f"<p><code>{escape(command)}</code></p>"
  return page("Fewer experts of a trained model", intro, [(f"Loss against experts, {study['split']} split", body)])


def _arms(summary: list[dict]) -> list[str]:
  """Returns the arms that have a curve: policies of one budget are in the table."""
  every = [row["arm"] for row in summary]
  return [arm for arm in dict.fromkeys(every) if every.count(arm) > 1]


def _points(summary: list[dict], arm: str, kind: str) -> list[tuple[float, float]]:
  return sorted((row[f"{kind}_experts"], 100 * row[f"{kind}_rise"]) for row in summary if row["arm"] == arm)


def _chart(series: list[Series], title: str) -> str:
  return line_chart(
    series, title=title, x_label="mean experts per token", y_label="rise of the loss, %", include_zero=True
  )


def _policies(summary: list[dict], arms: list[str]) -> str:
  series = [Series(arm, _points(summary, arm, "policy"), color, "dots") for color, arm in enumerate(arms, 1)]
  return _chart(series, "policies")


def _curve(study: dict, arm: str) -> str:
  series = [Series("policy", _points(study["summary"], arm, "policy"), 1, "dots")]
  for color, (kind, words) in enumerate(CONTROLS.items(), 2):
    series.append(Series(words, _points(study["summary"], arm, kind), color))
  runs = [run for run in study["runs"] if run["arm"] == arm]
  fixed = [
    (float(index + 1), 100 * statistics.fmean(run["fixed"][index]["rise"] for run in runs))
    for index in range(len(runs[0]["fixed"]))
  ]
  series.append(Series("fixed counts", [*fixed, (runs[0]["full"]["experts"], 0.0)], 4, "dots"))
  return _chart(series, arm)


def text(study: dict) -> str:
  """Returns the table, and of upcycled bases whether they are what they should be."""
  lines = [table(study["summary"]), ""] if study["upcycled"] else [table(study["summary"])]
  for one in study["upcycled"]:
    lines.append(
      f"seed {one['seed']}: loss {one['dense']:.4f} dense; upcycled {'the same' if one['same'] else 'NOT THE SAME'} "
      f"({one['moved']:.1e} apart); {one['tuned']:.4f} trained on, one expert {one['one_expert_rise']:+.2%}"
      f"{'' if one['apart'] else ': COPIES NOT APART'}"
    )
  return "\n".join(lines)


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
