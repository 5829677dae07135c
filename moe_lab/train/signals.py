"""Preemption: SIGTERM asks for a save, and the loop looks between steps."""

import signal
import sys


class Preemption:
  """While entered, SIGTERM only sets `requested`; the step in progress is finished first."""

  def __init__(self):
    self.requested = False

  def __enter__(self) -> "Preemption":
    self._before = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *_) -> None:
    signal.signal(signal.SIGTERM, self._before)

  def _request(self, *_) -> None:
    self.requested = True
    print("SIGTERM: saving after this step", file=sys.stderr, flush=True)
