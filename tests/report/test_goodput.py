"""Goodput: hand arithmetic."""

import pytest

from moe_lab.report.goodput import goodput

INFO = {"started": "2026-01-01T00:00:00+00:00"}
BEGAN = 1767225600.0  # that in seconds


def record(step, seconds_per_step, at):
  return {"step": step, "tokens": 100.0 * step, "tokens_per_second": 100 / seconds_per_step, "time": BEGAN + at}


def test_what_is_compiled_done_again_and_waited_for_is_lost():
  # 10 steps of 2 s each; 5 s more for compiling in the first record; restarted after step 8, with 30 s in between.
  train = [record(4, 2.0 + 5 / 4, 13), record(8, 2.0, 21), record(9, 2.0, 60), record(10, 2.0, 62)]
  found = goodput(train, INFO)
  assert found.useful == pytest.approx(20) and found.elapsed == pytest.approx(62)
  assert found.share == pytest.approx(20 / 62)


def test_a_clock_that_was_set_back_gives_no_more_than_everything():
  assert goodput([record(4, 2.0, 13), record(8, 2.0, -500)], INFO).share == pytest.approx(16 / 16)


@pytest.mark.parametrize(
  ("train", "info"),
  [([], INFO), ([record(4, 2.0, 13)], {}), ([{"step": 4, "tokens": 400.0}], INFO)],
)
def test_records_that_say_nothing(train, info):
  assert goodput(train, info) is None
