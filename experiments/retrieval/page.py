"""Accuracy against length, drawn and as a table."""

from moe_lab.report.charts import Series, line_chart
from moe_lab.report.page import escape, figure, page

KINDS = ("passkey", "multikey")
WAYS = {
  "as trained": "as trained",
  "interpolated": "positions interpolated to the trained length",
  "sharpened": "global groups' logits sharpened",
}


def page_of(summary: list[dict], command: str) -> str:
  """Returns the study's page.

  Args:
    summary: entries of "arm", "way", "length", "by_seed" and, by kind of question, the share of right answers.
    command: that made it.
  """
  drawings = "".join(
    figure(_curve(summary, kind, way), f"{kind}, {words}: mean over seeds.")
    for way, words in WAYS.items()
    for kind in KINDS
  )
  body = f'<div class="pair">{drawings}</div><pre>{escape(table(summary))}</pre>'
  return page("Retrieval against length", f"<p><code>{escape(command)}</code></p>", [("Right answers", body)])


def _curve(summary: list[dict], kind: str, way: str) -> str:
  arms = list(dict.fromkeys(entry["arm"] for entry in summary))
  series = [
    Series(
      arm,
      sorted((e["length"], e[kind]) for e in summary if e["arm"] == arm and e["way"] == way),
      index,
      "dots",
    )
    for index, arm in enumerate(arms, 1)
  ]
  return line_chart(
    series, title=f"{kind}, {WAYS[way]}", x_label="tokens", y_label="right answers, share", include_zero=True
  )


def table(summary: list[dict]) -> str:
  """Returns the shares as text: a line for each arm, way and kind that was asked, a column for each length.

  In brackets are those of the seeds, in percent.
  """
  lengths = sorted({entry["length"] for entry in summary})
  lines = []
  for arm in dict.fromkeys(entry["arm"] for entry in summary):
    for way in WAYS:
      for kind in KINDS:
        cells = {
          e["length"]: f"{e[kind]:.0%} (" + " ".join(f"{100 * s[kind]:.0f}" for s in e["by_seed"].values()) + ")"
          for e in summary
          if e["arm"] == arm and e["way"] == way
        }
        shares = "  ".join(f"{cells.get(length, '-'):>18}" for length in lengths)
        if cells:
          lines.append(f"{arm:10} {kind:9} {way:13}{shares}")
  return "\n".join([f"{'':34}" + "  ".join(f"{length:>18,}" for length in lengths), *lines])
