"""Preemption: SIGTERM asks for a save, and the loop looks between steps."""

import collections
import functools
import signal
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


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
  question goes along with the training step, one number a device. As a program of its own beside the step it would
  deadlock on CPU, where two programs that talk to other devices get in each other's way.
  """

  def __init__(self, preemption: Preemption, mesh: Mesh | None):
    self._preemption, self._mesh = preemption, mesh
    self._answers: collections.deque[jax.Array] = collections.deque()

  def along(self, train_step: Callable) -> Callable:
    """Returns `train_step` (of a state, which it takes for itself, and a batch), with the question in it."""
    if jax.process_count() == 1:
      return train_step
    by_device, copied = (NamedSharding(self._mesh, P(*axes)) for axes in ((self._mesh.axis_names,), ()))

    @functools.partial(jax.jit, donate_argnums=0)
    def both(state, batch, asked):
      return *train_step(state, batch), jax.lax.with_sharding_constraint(jnp.any(asked), copied)

    def step(state, batch):
      mine = np.full(1, self._preemption.requested)
      asked = jax.make_array_from_callback((self._mesh.size,), by_device, lambda _: mine)
      *results, answer = both(state, batch, asked)
      self._answers.append(answer)
      return results

    return step

  def requested(self) -> bool:
    """Returns the answer of the step before the last: to wait for the last would hold up the next one's preparation."""
    if jax.process_count() == 1:
      return self._preemption.requested
    return len(self._answers) > 1 and bool(self._answers.popleft())
