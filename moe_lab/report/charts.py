"""Charts as inline SVG that takes the page's colours.

Drawn by hand: a plotting library's SVG brings fonts, fixed colours that fail
in dark mode, and ten times the size.
"""

import dataclasses
import html
import itertools
from collections.abc import Callable, Sequence

from moe_lab.report.numbers import is_number, scaled, ticks
from moe_lab.report.palette import ink, shade
from moe_lab.report.svg import open_svg, rect, scale, text, tick_text

Point = tuple[float, float | None]

_WIDTH, _HEIGHT = 480, 260  # of the drawing; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 38
_MAX_POINTS = 500  # a series has no more: the eye sees no difference, the file does


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a chart.

  Attributes:
    name: for the legend.
    points: (x, y), x ascending; y None leaves a gap.
    colour: which of the page's line colours, 1 to 8.
    style: line | faint | dashed | dots (a line with a dot at each point).
  """

  name: str
  points: Sequence[Point]
  colour: int
  style: str = "line"


def line_chart(
  series: Sequence[Series], *, title: str, x_label: str, y_label: str, include_zero: bool = False, height: int = _HEIGHT
) -> str:
  """Returns an SVG of the series over a common x; "" where none has two points.

  Args:
    series: drawn in this order.
    title: what a screen reader says.
    x_label: with unit; x is printed with prefixes (k, M, ...).
    y_label: with unit.
    include_zero: whether the y axis must reach down to 0.
    height: of the drawing, in its own units (480 wide).
  """
  series = [s for s in series if sum(is_number(y) for _, y in s.points) > 1]
  if not series:
    return ""
  xs = [x for s in series for x, _ in s.points]
  ys = [y for s in series for _, y in s.points if is_number(y)]
  x_low, x_high = min(xs), max(xs)
  y_low, y_high = min(ys), max(ys)
  if include_zero:
    y_low, y_high = min(y_low, 0.0), max(y_high, 0.0)
  margin = (y_high - y_low) * 0.05 or abs(y_high) * 0.05 or 1.0
  y_low, y_high = (y_low if include_zero and y_low == 0 else y_low - margin), y_high + margin
  to_x = scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
  to_y = scale(y_low, y_high, height - _BOTTOM, _TOP)

  out = [open_svg(title, _WIDTH, height)]
  y_ticks = ticks(y_low, y_high, 5 if height > 180 else 3)
  for y in y_ticks:
    out.append(f'<path class="grid" d="M{_LEFT} {to_y(y):.1f}H{_WIDTH - _RIGHT}"/>')
    out.append(text(_LEFT - 6, to_y(y) + 4, tick_text(y, y_ticks), "end"))
  for x in ticks(x_low, x_high, 5):
    out.append(text(to_x(x), height - _BOTTOM + 16, scaled(x), "mid"))
  out.append(f'<path class="axis" d="M{_LEFT} {height - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
  across, down = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + height - _BOTTOM) / 2
  out.append(text(across, height - 5, html.escape(x_label), "mid label"))
  out.append(f'<g transform="rotate(-90 11 {down})">{text(11, down, html.escape(y_label), "mid label")}</g>')
  for s in series:
    out.append(f'<path class="line c{s.colour} {s.style}" d="{_path(s.points, to_x, to_y)}"/>')
    if s.style == "dots":
      dots = "".join(f"M{to_x(x):.1f} {to_y(y):.1f}h0" for x, y in thin(s.points) if is_number(y))
      out.append(f'<path class="dot c{s.colour}" d="{dots}"/>')
  out.append("</svg>")
  return "".join(out) + _legend(series)


def shares_chart(rows: Sequence[Sequence[float]], *, title: str, first: int = 0) -> str:
  """Returns an SVG of one bar a layer, split by the share of each count.

  Args:
    rows: [Z][counts], shares that sum to one (or anything in proportion).
    title: what a screen reader says.
    first: the count of the first column.
  """
  used = [index for index in range(max(map(len, rows))) if any(index < len(row) and row[index] > 0 for row in rows)]
  if not used:
    return ""
  low, high = used[0], used[-1]
  bar = 18
  height = len(rows) * (bar + 4) + 26
  to_x = scale(0.0, 1.0, _LEFT, _WIDTH - 44)
  out = [open_svg(title, _WIDTH, height)]
  out += [text(_LEFT - 6, 12, "layer", "end label"), text(_WIDTH - 4, 12, "mean", "end label")]
  for layer, row in enumerate(rows):
    total = sum(row)
    top = 20 + layer * (bar + 4)
    out.append(text(_LEFT - 6, top + 13, str(layer), "end"))
    if not total > 0:
      continue
    at = 0.0
    for index, share in enumerate(value / total for value in row):
      if share <= 0:
        continue
      colour = _count_colour(index, low, high)
      left, width = to_x(at), to_x(at + share) - to_x(at)
      tip = f"layer {layer}: {index + first} experts for {share:.1%} of the tokens"
      # A narrow part has no room for its number; the tooltip still tells it.
      number = text(left + width / 2, top + 13, f"{share:.0%}", "mid", ink(colour)) if width > 33 else ""
      out.append(f"<g><title>{tip}</title>{rect(left, top, width, bar, colour)}{number}</g>")
      at += share
    mean = sum((index + first) * value for index, value in enumerate(row)) / total
    out.append(text(_WIDTH - 4, top + 13, f"{mean:.2f}", "end"))
  out.append("</svg>")
  keys = "".join(
    f'<li><i style="background:{_count_colour(index, low, high)}"></i>{index + first}</li>'
    for index in range(low, high + 1)
  )
  return "".join(out) + f'<ul class="legend"><li>experts:</li>{keys}</ul>'


def heat_map(rows: Sequence[Sequence[float]], *, title: str, top: float) -> str:
  """Returns an SVG of E columns by Z rows.

  Args:
    rows: [Z][E], load over the mean load: 1 is balanced.
    title: what a screen reader says.
    top: the value of the last colour; the first is 0.
  """
  columns = max(map(len, rows))
  wide = (_WIDTH - _LEFT - 4) / columns
  tall = min(max(wide, 12), 24)
  height = 40 + len(rows) * tall
  out = [open_svg(title, _WIDTH, round(height))]
  detailed = columns * len(rows) <= 1024
  by_colour: dict[str, list[str]] = {}
  for layer, row in enumerate(rows):
    y = 18 + layer * tall
    if layer % max(1, len(rows) // 12) == 0:
      out.append(text(_LEFT - 6, y + tall / 2 + 4, str(layer), "end"))
    for expert, load in enumerate(row):
      colour = shade(round(load / top * 23) / 23)
      x = _LEFT + expert * wide
      if detailed:
        tip = f"layer {layer}, expert {expert}: {load:.2f} times the mean load"
        number = text(x + wide / 2, y + tall / 2 + 4, f"{load:.1f}", "mid cell", ink(colour)) if wide >= 24 else ""
        out.append(f"<g><title>{tip}</title>{rect(x, y, wide, tall, colour)}{number}</g>")
      else:
        by_colour.setdefault(colour, []).append(f"M{x:.1f} {y:.1f}h{wide:.2f}v{tall:.2f}h-{wide:.2f}z")
  # Thousands of rectangles are one path a colour.
  out += [f'<path fill="{colour}" d="{"".join(cells)}"/>' for colour, cells in by_colour.items()]
  out.append(text(_LEFT - 6, 12, "layer", "end label"))
  for expert in ticks(0, columns - 1, 8):
    if expert == int(expert):
      out.append(text(_LEFT + (expert + 0.5) * wide, 12, str(int(expert)), "mid"))
  out.append(text((_LEFT + _WIDTH) / 2, height - 6, "expert", "mid label") + "</svg>")
  return "".join(out)


def thin(points: Sequence[Point]) -> Sequence[Point]:
  """Returns at most some 500 of the points, the last one among them."""
  stride = max(1, -(-len(points) // _MAX_POINTS))
  return [*points[:-1:stride], points[-1]] if stride > 1 else points


def _path(points: Sequence[Point], to_x: Callable, to_y: Callable) -> str:
  drawn = []
  for known, part in itertools.groupby(thin(points), key=lambda point: is_number(point[1])):
    if known:
      drawn.append("M" + "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in part))
  return "".join(drawn)


def _legend(series: Sequence[Series]) -> str:
  keys = []
  for s in series:
    dot = f'<path class="dot c{s.colour}" d="M13 4h0"/>' if s.style == "dots" else ""
    mark = f'<path class="line c{s.colour} {s.style}" d="M1 4H25"/>{dot}'
    keys.append(f'<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true">{mark}</svg>{html.escape(s.name)}</li>')
  return f'<ul class="legend">{"".join(keys)}</ul>'


def _count_colour(index: int, low: int, high: int) -> str:
  return shade((index - low) / max(high - low, 1))
