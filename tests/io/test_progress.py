import io
import sys

import pytest

from moe_lab.io import progress as progress_lib
from moe_lab.io.progress import Count, Progress, told


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


@pytest.fixture
def seconds(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
  return now


def test_plain_lines_away_from_a_terminal(capsys, seconds):
  with Progress(1000) as progress:
    progress.update(10, loss=3.214, mean_experts=2.041, budget=2.0, tokens_per_second=12_345)
    seconds[0] += 2
    progress.update(20, loss=3.1)
    progress.note("validation 3.05 nats")
    progress.update(1000, loss=2.0)
  out, err = capsys.readouterr()
  # 10 steps in 2 s, 980 to go: 196 s.
  assert err.splitlines() == [
    "step 10/1000  loss 3.21  experts 2.04/2.00  12.3k tok/s",
    "step 20/1000  loss 3.10  3:16 left",
    "validation 3.05 nats",
    "step 1000/1000  loss 2.00",
  ]
  assert out == "" and err.replace("\n", "").isprintable()


def test_one_line_on_a_terminal(monkeypatch, capsys, seconds):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  with Progress(1000) as progress:
    progress.update(330, loss=3.3)
    seconds[0] += 1
    progress.update(340, loss=3.21, mean_experts=2.04, budget=2.0, tokens_per_second=12_300)
    progress.note("[eval] 3.05")
    line = progress._render().plain
    print("result")
  assert line.startswith("step 340/1000 ━━━━━━━━╸━") or line.startswith("step 340/1000 ━━━━━━━━━")
  assert line.endswith("loss 3.21  experts 2.04/2.00  12.3k tok/s  1:06 left")
  assert len(line) < 100
  assert "[eval] 3.05" in terminal.getvalue() and "step 340/1000" in terminal.getvalue()
  assert capsys.readouterr().out == "result\n"


def test_a_narrow_terminal_gets_the_numbers(monkeypatch):
  monkeypatch.setattr(sys, "stderr", Terminal())
  monkeypatch.setenv("COLUMNS", "40")
  progress = Progress(10)
  with progress:
    progress.update(5, loss=1.0, mean_experts=2.0, budget=2.0)
    assert progress._render().plain == "step 5/10  loss 1.00  experts 2.00/2.00"


@pytest.mark.parametrize(
  "number, text", [(0, "0"), (950, "950"), (999.6, "1k"), (12_345, "12.3k"), (4_560_000, "4.56M")]
)
def test_short(number, text):
  assert progress_lib.short(number) == text


@pytest.mark.parametrize("seconds_, text", [(0, "0:00"), (102, "1:42"), (3600 + 123.4, "1:02:03")])
def test_clock(seconds_, text):
  assert progress_lib.clock(seconds_) == text


def test_a_count_says_each_tenth_away_from_a_terminal(capsys, seconds):
  with Count("scored", 25) as count:
    for _ in range(25):
      seconds[0] += 1
      count.add()
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 10 and lines[0] == "3 of 25 scored, 0:03" and lines[-1] == "25 of 25 scored, 0:25"


def test_a_count_is_one_line_in_a_terminal(monkeypatch, seconds):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with Count("scored", 3) as count:
    for _ in range(3):
      count.add()
  shown = terminal.getvalue()
  assert shown.count("\n") == 1 and shown.count("\r") == 3 and "3 of 3 scored" in shown


def test_told_yields_everything_and_says_how_far_it_is_every_ten_seconds(seconds):
  said, seen = [], []
  for item in told("abcdef", "letters", said.append):
    seen.append(item)
    seconds[0] += 4
  assert "".join(seen) == "abcdef" and said == ["3 letters, 0:12"]
