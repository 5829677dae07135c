"""Preemption: SIGTERM asks for a save, and the loop looks between steps."""

import collections
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_LAG = 2  # steps


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


class AnyPreempted:
  """Whether any process of a run has been asked to stop: all get the same answer at the same step.

  jax's own service for this (`multihost_utils.reached_preemption_sync_point`) wants SIGTERM for itself, and to be asked
  at every step by the loop alone, while Orbax asks it too, from a thread and about the step that it saves. So the
  question goes along with the steps instead, one number a device. To wait for the answer would keep the host from
  preparing the next step while the devices compute: it is that of two steps ago.
  """

  def __init__(self, preemption: Preemption, mesh: Mesh | None):
    self._preemption = preemption
    self._answers: collections.deque[jax.Array] = collections.deque()
    if jax.process_count() > 1:
      self._spread = NamedSharding(mesh, P(mesh.axis_names))
      self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

  def requested(self) -> bool:
    """To be called once before every step, by all processes."""
    if jax.process_count() == 1:
      return self._preemption.requested
    mine = np.full(1, self._preemption.requested)
    asked = jax.make_array_from_callback((self._spread.mesh.size,), self._spread, lambda _: mine)
    self._answers.append(self._any(asked))
    return len(self._answers) > _LAG and bool(self._answers.popleft())
