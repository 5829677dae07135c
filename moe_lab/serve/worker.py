"""The engine on a thread of its own, and requests of asyncio's side that it serves together.

Only that thread touches the engine. It takes requests and cancellations between two steps, and hands over what a step
made in one call; what a reader has not fetched yet waits in its job, so that no reader holds up the engine.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from moe_lab.infer.engine import Engine, Token
from moe_lab.infer.request import Request
from moe_lab.serve.refusals import Refusal

STUCK_SECONDS = 120.0  # in one step of the engine; it is taken for dead then

log = logging.getLogger("moe_lab.serve")

Arrived = list[tuple[int, Token]]  # which of a job's requests, and its next token


class Job:
  """Some requests of one client; a bounded number of tokens, since each has its `max_tokens`.

  Attributes:
    requests: what the engine is asked for.
    began: when, in monotonic seconds.
    first: when the first token of each came; None before.
    made: tokens of each that have come.
  """

  def __init__(self, requests: Sequence[Request]):
    self.requests = tuple(requests)
    self.began = time.monotonic()
    self.first: list[float | None] = [None] * len(requests)
    self.made = [0] * len(requests)
    self._inbox: Arrived = []
    self._news = asyncio.Event()
    self._left = len(requests)  # that have not ended
    self._failure: Refusal | None = None

  def put(self, arrived: Arrived) -> None:
    """Takes tokens in."""
    self._inbox += arrived
    self._left -= sum(token.finish is not None for _, token in arrived)
    self._news.set()

  def fail(self, failure: Refusal) -> None:
    """Ends it: the reader gets what has come, and then the failure."""
    self._failure = failure
    self._news.set()

  async def arrivals(self) -> AsyncIterator[Arrived]:
    """Yields what has come since the last time, until all requests have ended."""
    while True:
      await self._news.wait()
      self._news.clear()
      arrived, self._inbox = self._inbox, []
      if arrived:
        yield arrived
      if self._failure is not None:
        raise self._failure
      if self._left == 0 and not self._inbox:
        return


class Worker:
  """Runs the engine. All methods are for the event loop's thread.

  Attributes:
    slots: sequences that are decoded together.
    most: responses that are served or wait at a time.
    failure: what ended the engine; None while it is well.
  """

  def __init__(self, engine: Engine, queue_length: int, observe: Callable[[Job, int, Token], None]):
    """Args: queue_length: responses that may wait; observe: hears each token, with its job and the request's number."""
    self.slots, self.most, self.failure = engine.slots, engine.slots + queue_length, None
    self._engine, self._observe = engine, observe
    self._orders: queue.SimpleQueue = queue.SimpleQueue()
    self._open: dict[Job, int] = {}  # jobs and their responses that have not ended
    self._jobs: dict[int, tuple[Job, int]] = {}  # ticket -> whose it is; the engine thread's
    self._step_began: float | None = None
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread; called in the event loop."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after its step; what is open fails."""
    self._orders.put(None)
    self._fail_all(Refusal(503, "the server is ending", code="ending"))

  def join(self, seconds: float) -> None:
    """Waits for the thread's end."""
    self._thread.join(seconds)

  @property
  def num_open(self) -> int:
    """Responses that are being made or wait."""
    return sum(self._open.values())

  @property
  def num_serving(self) -> int:
    return min(self.num_open, self.slots)

  @property
  def num_waiting(self) -> int:
    return self.num_open - self.num_serving

  @property
  def trouble(self) -> str | None:
    """What is wrong with the engine; None if nothing is."""
    if self.failure is not None:
      return f"the engine has failed ({type(self.failure).__name__})"
    began = self._step_began
    if began is not None and time.monotonic() - began > STUCK_SECONDS:
      return f"the engine has been in one step for more than {STUCK_SECONDS:.0f} s"
    return None

  def submit(self, job: Job) -> None:
    """Has a job served.

    Raises:
      Refusal: there is no room, or no engine any more.
    """
    if trouble := self.trouble:
      raise Refusal(503, trouble, code="engine_failed")
    if self.num_open + len(job.requests) > self.most:
      raise Refusal(429, f"all {self.slots} slots and the queue are taken; try again soon", code="queue_full")
    self._open[job] = len(job.requests)
    self._orders.put((job, True))

  def cancel(self, job: Job) -> None:
    """Forgets a job; its slots are free before the engine's next step. Nothing happens if it has ended."""
    if self._open.pop(job, None):
      self._orders.put((job, False))

  def _deliver(self, made: dict[Job, Arrived]) -> None:
    for job, arrived in made.items():
      if job not in self._open:
        continue  # cancelled meanwhile
      for index, token in arrived:
        self._observe(job, index, token)
      self._open[job] -= sum(token.finish is not None for _, token in arrived)
      if not self._open[job]:
        del self._open[job]
      job.put(arrived)

  def _fail(self, error: BaseException) -> None:
    self.failure = error
    self._fail_all(Refusal(500, "the engine failed", code="engine_failed"))

  def _fail_all(self, refusal: Refusal) -> None:
    for job in self._open:
      job.fail(refusal)
    self._open.clear()

  # The engine's thread.

  def _run(self) -> None:
    try:
      while self._take_orders():
        if self._engine.busy:
          self._step_began = time.monotonic()
          made = self._engine.step()
          self._step_began = None
          self._hand_over(made)
    except BaseException as error:  # whatever it is, who waits must hear of it
      self._step_began = None
      log.error("the engine failed", exc_info=error)
      self._call(self._fail, error)
    else:
      for ticket in self._jobs:
        self._engine.cancel(ticket)

  def _take_orders(self) -> bool:
    """Does what was ordered, and waits for an order where there is nothing else to do; False: it is time to end."""
    while True:
      try:
        order = self._orders.get(block=not self._engine.busy)
      except queue.Empty:
        return True
      if order is None:
        return False
      job, wanted = order
      if wanted:
        for index, request in enumerate(job.requests):
          self._jobs[self._engine.submit(request)] = job, index
      else:
        for ticket in [ticket for ticket, (owner, _) in self._jobs.items() if owner is job]:
          del self._jobs[ticket]
          self._engine.cancel(ticket)

  def _hand_over(self, made: Sequence[tuple[int, Token]]) -> None:
    by_job: dict[Job, Arrived] = {}
    for ticket, token in made:
      job, index = self._jobs[ticket]
      by_job.setdefault(job, []).append((index, token))
      if token.finish is not None:
        del self._jobs[ticket]
    if by_job:
      self._call(self._deliver, by_job)

  def _call(self, function: Callable, argument: object) -> None:
    try:
      self._loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
      pass  # the loop has ended, and nobody waits any more
