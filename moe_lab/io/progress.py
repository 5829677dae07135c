"""The line that people watch while a run trains."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

_WINDOW = 20  # updates over which the speed for the time left is taken; the first steps compile and say nothing
_BAR_WIDTH = 24
_TOLD_EVERY = 10.0  # seconds


class Progress:
  """Shows how far a run is: one refreshing line on a terminal, plain lines elsewhere; always on stderr.

  Away from a terminal each `update` prints a line without control characters,
  so the caller decides how often.
  """

  def __init__(self, total_steps: int, shown: bool = True):
    """Args: total_steps: of the run; shown: False in a process of several that is to be silent."""
    self._total = total_steps
    self._shown = shown
    self._left = ""  # "step 340/1000"
    self._right = ""  # "loss 3.21  experts 2.04/2.00  12.3k tok/s"
    self._step = 0
    self._marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW)  # (step, monotonic seconds)
    self._console = Console(file=sys.stderr)
    self._live: Live | None = None

  def __enter__(self) -> "Progress":
    if self._shown and sys.stderr.isatty() and not self._console.is_dumb_terminal:
      # stdout is left alone: its last line belongs to the caller's JSON.
      self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False)
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  def update(
    self,
    step: int,
    *,
    loss: float | None = None,
    mean_experts: float | None = None,
    budget: float | None = None,
    tokens_per_second: float | None = None,
  ) -> None:
    """Moves to `step`; what is None is left out.

    Args:
      step: finished steps.
      loss: nats per token.
      mean_experts: experts per token and layer.
      budget: what `mean_experts` should be; None where nothing steers it.
      tokens_per_second: training speed.
    """
    self._step = step
    self._marks.append((step, time.monotonic()))
    parts = []
    if loss is not None:
      parts.append(f"loss {loss:.2f}" if loss < 100 else f"loss {loss:.3g}")
    if mean_experts is not None:
      parts.append(f"experts {mean_experts:.2f}" + ("" if budget is None else f"/{budget:.2f}"))
    if tokens_per_second is not None:
      parts.append(f"{short(tokens_per_second)} tok/s")
    self._left, self._right = f"step {step}/{self._total}", "  ".join(parts)
    if self._live is None:
      eta = self._eta()
      self._print("  ".join(part for part in (self._left, self._right, eta and f"{eta} left") if part))

  def note(self, text: str) -> None:
    """Prints a line that stays, such as the result of an evaluation."""
    if self._live is None:
      self._print(text)
    else:
      self._console.print(text, markup=False, highlight=False)

  def _print(self, line: str) -> None:
    if self._shown:
      print(line, file=sys.stderr, flush=True)

  def _eta(self) -> str:
    """Returns the time left as "1:42", or "" while unknown."""
    if self._step >= self._total or len(self._marks) < 2 or self._marks[-1][0] <= self._marks[0][0]:
      return ""
    (step_0, time_0), (step_1, time_1) = self._marks[0], self._marks[-1]
    left = (self._total - step_1) * (time_1 - time_0) / (step_1 - step_0) - (time.monotonic() - time_1)
    return clock(max(left, 0))

  def _render(self) -> Text:
    eta = self._eta()
    right = "  ".join(part for part in (self._right, eta and f"{eta} left") if part)
    left = self._left or f"step 0/{self._total}"
    line = Text(f"{left} ", no_wrap=True, overflow="ellipsis")
    width = min(_BAR_WIDTH, self._console.width - len(left) - len(right) - 4)
    if width >= 4:  # a bar says nothing below that; a narrow terminal gets the numbers alone
      # Done and to do are one character in two colours, so without colours they need two characters.
      plain = self._console.options.ascii_only or self._console.no_color or self._console.color_system is None
      line.append_text(_bar(self._step / max(self._total, 1), width, plain=plain))
    line.append(f" {right}")
    return line


class Count:
  """A line on stderr that counts up to a total; away from a terminal a plain line for each tenth."""

  def __init__(self, what: str, total: int):
    """Args: what: is counted, as in "scored"; total: of it."""
    self._what, self._total, self._done = what, total, 0
    self._started = time.monotonic()
    self._live = sys.stderr.isatty()

  def __enter__(self) -> "Count":
    return self

  def __exit__(self, *_) -> None:
    if self._live:
      print(file=sys.stderr)

  def add(self) -> None:
    """Counts one."""
    self._done += 1
    tenths = 10 * self._done // self._total > 10 * (self._done - 1) // self._total
    if self._live or tenths:
      line = f"{self._done} of {self._total} {self._what}, {clock(time.monotonic() - self._started)}"
      print(f"\r{line}\x1b[K" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)


def told(items: Iterable, what: str, note: Callable[[str], None]) -> Iterator:
  """Yields the items, whose number nobody knows, and every ten seconds notes how many `what` there were so far."""
  started = said = time.monotonic()
  for done, item in enumerate(items):
    now = time.monotonic()
    if now - said >= _TOLD_EVERY:
      note(f"{done} {what}, {clock(now - started)}")
      said = now
    yield item


def _bar(share: float, width: int, *, plain: bool) -> Text:
  halves = round(min(max(share, 0), 1) * 2 * width)
  if plain:
    return Text("#" * (halves // 2) + "." * (width - halves // 2))
  full, half = divmod(halves, 2)
  return Text.assemble(("━" * full + "╸" * half, "cyan"), ("━" * (width - full - half), "bright_black"))


def short(number: float) -> str:
  """Returns a number in three digits: 950, 12.3k, 4.56M."""
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size * 0.9995:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


def clock(seconds: float) -> str:
  """Returns a duration as 1:42, or 2:03:20 from an hour on."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
