"""The scatter chart: every model a mark with its tip, on a logarithmic axis with round numbers."""

import re

import pytest

from moe_lab.report.scatter import Family, Mark, log_ticks, scatter_chart


def test_ticks_are_round_and_few():
  assert log_ticks(0.9, 1500) == [1, 10, 100, 1000]
  assert log_ticks(90, 1700) == [100, 200, 500, 1000]
  assert log_ticks(95, 330) == [100, 150, 200, 300]
  assert log_ticks(91_000, 104_000) == [95_000, 100_000]


def draw(*families):
  return scatter_chart(families, title="<t>", x_label="FLOPs & more", y_label="loss")


def test_marks_stand_where_they_should():
  # 100, 1000 and 10,000 with equal losses: evenly apart, on one height.
  marks = [Mark(10_000, 3.0, None, "third"), Mark(100, 3.0, 0.5, "<first>"), Mark(1000, 3.0, None, "")]
  drawing = draw(Family("a", marks, 0))
  places = [tuple(map(float, p)) for p in re.findall(r'class="mark c1" d="M([\d.]+) ([\d.]+)m', drawing)][:3]
  (x0, y0), (x1, y1), (x2, y2) = places
  assert y0 == y1 == y2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x1 - x0 > 100
  assert "&lt;first&gt;" in drawing and "<first>" not in drawing and "FLOPs &amp; more" in drawing
  assert re.search(r'class="thin c1" d="M[\d. L]+M[\d.]+ [\d.]+V', drawing)  # the line, and the one spread


def test_families_look_different():
  drawing = draw(*(Family(f"m{i}", [Mark(10 + i, 1.0 + i, None, "")], i) for i in range(14)))
  looks = re.findall(r'viewBox="0 0 26 12".*?class="mark (c\d)" d="M13 6(.*?)"', drawing)
  assert len(looks) == len(set(looks)) == 14


def test_nothing_to_draw():
  assert draw() == "" and draw(Family("a", [Mark(0, 1.0, None, ""), Mark(1, float("nan"), None, "")], 0)) == ""
