"""Preemption: SIGTERM asks for a save, and the loop looks between steps."""

import signal
import sys


class Preemption:
  """While entered, SIGTERM only sets `requested`; the step in progress is finished first.

  One may be entered inside another, as a run is inside a study: what either has heard, both know.
  """

  def __init__(self):
    self.requested = False

  def __enter__(self) -> "Preemption":
    self._before = signal.signal(signal.SIGTERM, self._request)
    if outer := self._outer():
      self.requested = outer.requested
    return self

  def __exit__(self, *_) -> None:
    signal.signal(signal.SIGTERM, self._before)
    if outer := self._outer():
      outer.requested |= self.requested

  def _outer(self) -> "Preemption | None":
    owner = getattr(self._before, "__self__", None)
    return owner if isinstance(owner, Preemption) else None

  def _request(self, *_) -> None:
    self.requested = True
    print("SIGTERM: saving after this step", file=sys.stderr, flush=True)
