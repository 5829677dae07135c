"""Models as marks: a loss against what it cost, with the spread over seeds, one colour and shape a method."""

import dataclasses
import html
import math
from collections.abc import Sequence

from moe_lab.report.numbers import is_number, scaled, ticks
from moe_lab.report.svg import open_svg, scale, text, tick_text

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 14, 10, 38
_COLOURS = 8
_SIZE = 4.5  # of a mark, from its middle
# Paths around (0, 0): circle, square, triangle, diamond, triangle on its tip; with eight colours, forty pairs.
_SHAPES = (
  "m-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z",
  "m-{r} -{r}h{d}v{d}h-{d}z",
  "m0 -{r}l{r} {d}h-{d}z",
  "m0 -{d}l{d} {d}l-{d} {d}l-{d} -{d}z",
  "m0 {r}l{r} -{d}h-{d}z",
)


@dataclasses.dataclass(frozen=True)
class Mark:
  """One model.

  Attributes:
    x, y: where it is.
    spread: of y over seeds, drawn as a bar each way; None: one seed.
    tip: what pointing at it tells.
  """

  x: float
  y: float
  spread: float | None
  tip: str


@dataclasses.dataclass(frozen=True)
class Family:
  """The models of one method, joined by a thin line where there are several.

  Attributes:
    name: for the legend.
    marks: in any order.
    index: which colour and shape; the same on every chart of a page.
  """

  name: str
  marks: Sequence[Mark]
  index: int


def scatter_chart(families: Sequence[Family], *, title: str, x_label: str, y_label: str) -> str:
  """Returns an SVG with a logarithmic x; "" without a mark.

  Args:
    families: drawn in this order.
    title: what a screen reader says.
    x_label: with unit; x is printed with prefixes (k, M, ...).
    y_label: with unit.
  """
  families = [family for family in families if any(_drawable(mark) for mark in family.marks)]
  marks = [mark for family in families for mark in family.marks if _drawable(mark)]
  if not marks:
    return ""
  x_low, x_high = _widened(min(math.log(m.x) for m in marks), max(math.log(m.x) for m in marks), 0.05)
  y_low, y_high = _widened(min(m.y - (m.spread or 0) for m in marks), max(m.y + (m.spread or 0) for m in marks), 0.06)
  to_log_x, to_y = scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT), scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP)

  out = [open_svg(title, _WIDTH, _HEIGHT)]
  y_ticks = ticks(y_low, y_high, 5)
  for y in y_ticks:
    out.append(f'<path class="grid" d="M{_LEFT} {to_y(y):.1f}H{_WIDTH - _RIGHT}"/>')
    out.append(text(_LEFT - 6, to_y(y) + 4, tick_text(y, y_ticks), "end"))
  for x in log_ticks(math.exp(x_low), math.exp(x_high)):
    out.append(text(to_log_x(math.log(x)), _HEIGHT - _BOTTOM + 16, scaled(x), "mid"))
  out.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
  across, down = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
  out.append(text(across, _HEIGHT - 5, html.escape(x_label), "mid label"))
  out.append(f'<g transform="rotate(-90 11 {down})">{text(11, down, html.escape(y_label), "mid label")}</g>')
  for family in families:
    drawn = sorted((mark for mark in family.marks if _drawable(mark)), key=lambda mark: mark.x)
    at = [(to_log_x(math.log(mark.x)), mark) for mark in drawn]
    line = "M" + "L".join(f"{x:.1f} {to_y(mark.y):.1f}" for x, mark in at) if len(at) > 1 else ""
    bars = "".join(
      f"M{x:.1f} {to_y(m.y - m.spread):.1f}V{to_y(m.y + m.spread):.1f}" for x, m in at if is_number(m.spread)
    )
    colour = f"c{family.index % _COLOURS + 1}"
    if line or bars:
      out.append(f'<path class="thin {colour}" d="{line}{bars}"/>')
    for x, mark in at:
      shape = f'<path class="mark {colour}" d="M{x:.1f} {to_y(mark.y):.1f}{_shape(family.index, _SIZE)}"/>'
      out.append(f"<g><title>{html.escape(mark.tip)}</title>{shape}</g>")
  return "".join(out) + "</svg>" + legend(families)


def legend(families: Sequence[Family]) -> str:
  """Returns the marks' meaning as a list."""
  keys = "".join(
    f'<li><svg class="key tall" viewBox="0 0 26 12" aria-hidden="true"><path class="mark c{f.index % _COLOURS + 1}" '
    f'd="M13 6{_shape(f.index, 4.0)}"/></svg>{html.escape(f.name)}</li>'
    for f in families
  )
  return f'<ul class="legend">{keys}</ul>'


def log_ticks(low: float, high: float) -> list[float]:
  """Returns round numbers for a logarithmic axis: powers of ten, with more between them the shorter the axis is.

  Args:
    low, high: ends of the axis, above 0.
  """
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
    found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    if len(found) >= 3:
      return found
  return ticks(low, high, 4)


def _shape(index: int, size: float) -> str:
  shape = index % len(_SHAPES)
  if shape == 3:
    size *= 0.65  # the diamond's path is drawn with twice the size
  return _SHAPES[shape].format(r=f"{size:g}", d=f"{2 * size:g}")


def _drawable(mark: Mark) -> bool:
  return is_number(mark.x) and mark.x > 0 and is_number(mark.y)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
  margin = (high - low) * share or abs(high) * share or 1.0
  return low - margin, high + margin
