"""The strokes that every drawing is made of: parts of an inline SVG that takes the page's colours."""

import html
from collections.abc import Callable, Sequence

from moe_lab.report.numbers import scaled


def text(x: float, y: float, shown: str, kind: str, colour: str = "") -> str:
  """Returns a text at (x, y), already escaped; `kind` are classes of the page's style."""
  style = f' style="fill:{colour}"' if colour else ""
  return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{style}>{shown}</text>'


def rect(x: float, y: float, width: float, height: float, colour: str) -> str:
  return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}"/>'


def open_svg(title: str, width: int, height: int) -> str:
  """Returns the opening tag of a drawing; the title is what a screen reader says."""
  return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
  """Returns the map of low..high onto start..end; the middle, where low is high."""
  if high == low:
    return lambda value: (start + end) / 2
  return lambda value: start + (value - low) / (high - low) * (end - start)


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
  """Returns a tick's number, with the decimals that tell it from its neighbours."""
  if max(abs(t) for t in all_ticks) >= 10_000:
    return scaled(value)
  step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else 1
  decimals = next((d for d in range(5) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 5)
  return f"{value:.{decimals}f}"
