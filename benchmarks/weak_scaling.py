"""Weak scaling of the compiled programs: 16 to 512 chips of v5p, each with the same tokens.

    python -m experiments.benchmark weak_scaling

The training step of `configs/medium_50b.py:8k` with one sequence a chip, experts shared by four chips and the rest of
the chips along `fsdp`. Tells what a chip sends by mesh axis and the share of the peak that the roofline leaves; nothing
is run. Needs libtpu, which holds the compiler, and no TPU; minutes each.
"""

import collections
from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from benchmarks.presets import preflight
from moe_lab.io.files import write_text
from moe_lab.report.page import escape, figure, page
from moe_lab.report.scatter import Family, Mark, scatter_chart

CONFIG = "configs/medium_50b.py:8k"
EXPERT = 4
TOPOLOGIES = {16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4", 128: "v5p:4x4x8", 256: "v5p:4x8x8", 512: "v5p:8x8x8"}


def by_axis(collective_bytes: dict[str, float]) -> dict[str, float]:
  """Returns the bytes that a chip sends in a step, by the mesh axes that they go along."""
  sent = collections.Counter()
  for name, amount in collective_bytes.items():
    sent[name.partition(" over ")[2]] += amount
  return dict(sent)


def report(note: Callable[[str], None]) -> list[dict]:
  """Returns the preflight at each number of chips, with `sent_by_axis`; `note` hears how far it is."""
  found = []
  for chips, topology in TOPOLOGIES.items():
    note(f"compiling for {chips} chips")
    batch = {"train.batch_size": chips, "train.accumulate": 1}
    one = preflight(CONFIG, topology, {"fsdp": chips // EXPERT, "expert": EXPERT}, batch)
    found.append(one | {"chips": chips, "sent_by_axis": by_axis(one.get("collective_bytes") or {})})
    note(one.get("error") or f"{one['bytes_per_chip'] / 2**30:.1f} GiB a chip")
  return found


def charts(found: list[dict]) -> list[str]:
  """Returns drawings of what a chip sends and of the roofline share, against chips."""
  found = [one for one in found if one.get("fits")]
  axes = sorted({axis for one in found for axis in one["sent_by_axis"]})
  sent = [
    Family(axis, [_mark(one, one["sent_by_axis"].get(axis, 0.0) / 1e9, "GB") for one in found], index)
    for index, axis in enumerate(axes)
  ]
  sent.append(Family("all", [_mark(one, sum(one["sent_by_axis"].values()) / 1e9, "GB") for one in found], len(axes)))
  share = [Family("of the chips' peak", [_mark(one, 100 * one["roofline_share"], "%") for one in found], 0)]
  share.append(
    Family("network's time over arithmetic's", [_mark(one, 100 * _network_over(one), "%") for one in found], 1)
  )
  return [
    scatter_chart(sent, title="Bytes that a chip sends in a step", x_label="chips", y_label="GB a chip and step"),
    scatter_chart(share, title="Roofline share and network time", x_label="chips", y_label="%"),
  ]


def _network_over(one: dict) -> float:
  return one["network_seconds"] / one["compute_seconds"]


def _mark(one: dict, y: float, unit: str) -> Mark:
  return Mark(one["chips"], y, None, f"{one['chips']} chips: {y:.1f} {unit}")


def save(folder: Path, found: list[dict], machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md, .json and, drawn, .html; returns the .md."""
  axes = sorted({axis for one in found for axis in one["sent_by_axis"]})
  rows = [("chips", "topology", "fsdp x expert", "a chip", "fits", *axes, "all", "network", "arithmetic", "share")]
  for one in found:
    if one.get("step_seconds") is None:
      error = one.get("error", "does not fit")
      rows.append((str(one["chips"]), one["topology"], error, *["-"] * (len(rows[0]) - 3)))
      continue
    sent = one["sent_by_axis"]
    rows.append(
      (
        str(one["chips"]),
        one["topology"],
        f"{one['mesh']['fsdp']} x {one['mesh']['expert']}",
        f"{one['bytes_per_chip'] / 2**30:.1f} of {one['chip_bytes'] / 2**30:.0f} GiB",
        "yes" if one["fits"] else "no",
        *(f"{sent.get(axis, 0.0) / 1e9:.2f} GB" for axis in axes),
        f"{sum(sent.values()) / 1e9:.1f} GB",
        f"{one['network_seconds']:.3f} s",
        f"{one['compute_seconds']:.3f} s",
        f"{one['roofline_share']:.0%}",
      )
    )
  words = (
    f"The training step of {CONFIG}, one sequence of 8,192 tokens a chip. By axis: what a chip sends in a step. "
    "The step's time is the longer of network and arithmetic by the roofline of moe_lab/preflight/roofline.py, which "
    f"takes them to overlap. Compiled, not run, on {results.in_words(machine)}"
  )
  table = results.markdown(rows)
  text = f"# weak_scaling\n\n    {command}\n\n{words}\n\n{table}\n"
  path = results.write(folder, "weak_scaling", machine, text, {"machine": machine, "results": found})
  drawn = [drawing for drawing in charts(found) if drawing]
  body = "".join(figure(drawing, words) for drawing in drawn) + f"<pre>{escape(table)}</pre>"
  write_text(
    path.with_suffix(".html"),
    page("Weak scaling", f"<p><code>{escape(command)}</code></p>", [("16 to 512 chips", body)]),
  )
  return path
