"""The soak's page: both loss curves over each other, the way of the faulty run, every fault."""

from collections import defaultdict
from collections.abc import Sequence

from moe_lab.report.charts import Series, line_chart
from moe_lab.report.numbers import number
from moe_lab.report.page import escape, figure, note, page, table

_SHOWN = 50  # differences


def page_of(
  result: dict, faults: Sequence[dict], differences: Sequence[str], records: Sequence[dict], calm: Sequence[dict]
) -> str:
  """Returns the page.

  Args:
    result: what the program returns.
    faults: each with its kind, time, minute, step, seconds until the run trained again, and what was seen.
    differences: in words.
    records: all of the faulty run, those of steps that were done again too.
    calm: the records of the calm run.
  """
  cards = [
    ("faults", str(len(faults)), f"one every {result['every']} s, in {number(result['minutes'], 1)} minutes"),
    ("differences", str(result["differences"]), f"{result['records_compared']:,} records, and the last checkpoint"),
    ("steps", f"{result['steps']:,}", f"{result['steps_twice']:,} done again"),
    ("starts", str(result["restarts"] + 1), "of the same line"),
    ("goodput", f"{result['goodput']:.0%}", "of the time in steps that count"),
  ]
  shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{unit}</dd></div>" for name, value, unit in cards)
  curves = figure(_losses(faults, records, calm), "Training loss of each step; in the faulty run the last one's.")
  way = figure(_way(faults, records), "Steps against time: back to the last checkpoint, or on from a save.")
  sections = [
    ("Loss", f'<div class="pair">{curves}{way}</div>'),
    ("Differences", _listed(differences) if differences else note("None.")),
    ("By kind", _kinds(faults)),
    ("Every fault", _every(faults)),
  ]
  return page("A run through faults, and a calm one", f'<dl class="cards">{shown}</dl>', sections)


def _losses(faults: Sequence[dict], records: Sequence[dict], calm: Sequence[dict]) -> str:
  ours, theirs = ({r["step"]: r["loss"] for r in rs if r["kind"] == "train"} for rs in (_in_time(records), calm))
  marks = [(fault["step"], ours[fault["step"]]) for fault in faults if fault["step"] in ours]
  series = [
    Series("calm", sorted(theirs.items()), 1),
    Series("with faults", sorted(ours.items()), 2, "dashed"),
    Series("a fault", _apart(marks), 3, "dots"),
  ]
  return line_chart(series, title="Training loss of both runs by step", x_label="step", y_label="loss, nats/token")


def _way(faults: Sequence[dict], records: Sequence[dict]) -> str:
  train = [record for record in _in_time(records) if record["kind"] == "train"]
  minutes = [((record["time"] - train[0]["time"]) / 60, record["step"]) for record in train]
  points = [((fault["time"] - train[0]["time"]) / 60, fault["step"]) for fault in faults]
  series = [Series("step", minutes, 2), Series("a fault", _apart(points), 3, "dots")]
  return line_chart(series, title="Steps of the run with faults against time", x_label="minutes", y_label="step")


def _in_time(records: Sequence[dict]) -> list[dict]:
  return sorted(records, key=lambda record: record["time"])


def _apart(points: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
  """Returns points with gaps between them: dots without a line."""
  return [point for x, y in points for point in ((x, y), (x, None))]


def _kinds(faults: Sequence[dict]) -> str:
  by_kind = defaultdict(list)
  for fault in faults:
    by_kind[fault["kind"]].append(fault["seconds"])
  rows = [
    [escape(kind), str(len(seconds)), number(sum(seconds) / len(seconds), 1)] for kind, seconds in by_kind.items()
  ]
  return table(["fault", "times", "seconds until it trained again, mean"], rows, sortable=True)


def _every(faults: Sequence[dict]) -> str:
  rows = [
    [str(index), escape(f["kind"]), escape(f["saw"]), number(f["minute"], 1), str(f["step"]), number(f["seconds"], 1)]
    for index, f in enumerate(faults, 1)
  ]
  return table(["", "fault", "what was seen", "minute", "at step", "seconds"], rows, text_columns=3)


def _listed(differences: Sequence[str]) -> str:
  more = note(f"and {len(differences) - _SHOWN} more") if len(differences) > _SHOWN else ""
  return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in differences[:_SHOWN]) + f"</ul>{more}"
