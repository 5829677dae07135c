"""Numbers, and tables of them in a terminal, as a reader wants them."""

import math
from collections.abc import Sequence


def number(value: object, digits: int = 2) -> str:
  """Returns `value` with `digits` decimals, or a dash when it is missing."""
  return f"{value:,.{digits}f}" if is_number(value) else "–"


def scaled(value: object, unit: str = "") -> str:
  """Returns three digits and a prefix: 12.3k, 4.56M; large powers as G, T, P, E. A dash when missing."""
  if not is_number(value):
    return "–"
  value = float(value)
  sizes = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
  size, prefix = next((entry for entry in sizes if abs(value) >= entry[0] * 0.9995), (1.0, ""))
  value /= size
  text = f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
  return f"{text} {prefix}{unit}" if unit else text + prefix


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
  if not high > low:
    return [low]
  step = 10 ** math.floor(math.log10((high - low) / count))
  while (high - low) / step > count * 1.5:
    # 1 -> 2 -> 5 -> 10
    step *= 2.5 if f"{step:e}".startswith("2") else 2
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [index * step for index in range(first, last + 1)]


def is_number(value: object) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def plus_minus(entry: dict | None, digits: int) -> str:
  """Returns "3.214 ± 0.012" of {"mean", "spread"}; the mean alone where there is no spread, a dash for None."""
  if entry is None:
    return number(None)
  spread = "" if entry["spread"] is None else f" ± {number(entry['spread'], digits)}"
  return number(entry["mean"], digits) + spread


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Returns lines of cells as plain text, each column as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
