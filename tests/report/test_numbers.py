import pytest

from moe_lab.report.numbers import number, scaled, ticks
from moe_lab.report.palette import LEVELS, ink, level, shade


@pytest.mark.parametrize(
  "value, text",
  [
    (0, "0"),
    (4_096_000, "4.1M"),
    (12_345, "12.3k"),
    (950, "950"),
    (0.5, "0.5"),
    (999_700, "1M"),
    (None, "–"),
    (float("nan"), "–"),
  ],
)
def test_scaled(value, text):
  assert scaled(value) == text


def test_units():
  assert scaled(9.83e12, "FLOP") == "9.83 TFLOP"
  assert scaled(12, "FLOP") == "12 FLOP"
  assert number(1234.5) == "1,234.50"
  assert number(None) == "–"


@pytest.mark.parametrize(
  "low, high, wanted",
  [(0, 10, [0, 2, 4, 6, 8, 10]), (2.9, 7.4, [3, 4, 5, 6, 7]), (-0.1, 0.1, [-0.1, -0.05, 0, 0.05, 0.1]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, wanted):
  assert ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("high", [1e-6, 0.037, 1, 8, 19, 255, 3e5, 7.7e17])
def test_ticks_are_few_and_inside(high):
  found = ticks(0, high)
  assert 3 <= len(found) <= 9
  assert found[0] == 0 and found[-1] <= high * (1 + 1e-9)


def luminance(colour):
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_shades_are_ordered_and_legible():
  shades = [shade(index / 100) for index in range(101)]
  assert (shades[0], shades[-1]) == ("#440154", "#fde725")
  bright = [luminance(colour) for colour in shades]
  assert bright == sorted(bright)
  for colour, light in zip(shades, bright, strict=True):
    contrast = (light + 0.05) / 0.05 if ink(colour) == "#000" else 1.05 / (light + 0.05)
    assert contrast >= 4.5  # WCAG AA
  assert [level(x) for x in (-1, 0, 1, 2)] == [0, 0, LEVELS - 1, LEVELS - 1]
