"""Serving until told to end: the parts put together, signals, and the last words."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable

import uvicorn

from moe_lab.infer.engine import Engine
from moe_lab.serve import limits
from moe_lab.serve.app import make_app
from moe_lab.serve.connection import Connection
from moe_lab.serve.guard import Guard
from moe_lab.serve.limits import Limits
from moe_lab.serve.metrics import Metrics
from moe_lab.serve.served import ServedModel
from moe_lab.serve.worker import Worker

PATIENCE = 0.05  # seconds between two looks at whether all requests are answered
_CLOSING_SECONDS = 2  # for what is on its way when all requests are answered
_STEP_SECONDS = 10.0  # for the engine's last step

log = logging.getLogger("moe_lab.serve")


class Server:
  """Serves a model on a socket.

  Attributes:
    metrics: its figures.
  """

  def __init__(
    self,
    name: str,
    config,
    tokenizer,
    engine: Engine,
    *,
    key: str | None = None,
    loopback: bool = True,
    bounds: Limits = Limits(),  # noqa: B008  frozen
    drain_seconds: float = 30.0,
  ):
    """Puts the parts together.

    Args:
      name: of the model.
      config: of the model.
      tokenizer: of the model.
      engine: that serves it, warmed up.
      key: that clients must have; None: none.
      loopback: whether the socket is for this machine only.
      bounds: what may be asked.
      drain_seconds: for what is being answered when the end is wanted.
    """
    served = ServedModel(name, config, tokenizer, engine)
    self.metrics = Metrics(served)
    self._worker = Worker(engine, bounds.queue, self.metrics.observe)
    self.metrics.watch(self._worker)
    app = make_app(
      served, self._worker, self.metrics, bounds, is_ending=lambda: self._guard.ending, with_key=key is not None
    )
    self._guard = Guard(app, key=key, loopback=loopback, count=self.metrics.count)
    self._bounds, self._drain_seconds = bounds, drain_seconds
    self._ends = 0  # how often the end was wanted
    self._wanted: Callable[[], None] = lambda: None

  def end(self) -> None:
    """Wants the end: what is being answered is finished; wanted again: at once. For signal handlers and threads."""
    self._ends += 1
    self._wanted()

  def run(self, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> dict:
    """Serves until `end`; returns the totals.

    Args:
      listener: bound; it is closed at the end.
      ready: called when requests are answered.
    """
    return asyncio.run(self._run(listener, ready))

  async def _run(self, listener: socket.socket, ready: Callable[[], None]) -> dict:
    loop, wanted, began = asyncio.get_running_loop(), asyncio.Event(), time.monotonic()

    def want():
      with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(wanted.set)

    self._wanted = want
    if self._ends:
      wanted.set()
    protocol = type("BoundConnection", (Connection,), {"most": self._bounds.connections})
    settings = uvicorn.Config(
      self._guard,
      http=protocol,
      ws="none",
      loop="asyncio",
      lifespan="off",
      log_config=None,
      access_log=False,
      server_header=False,
      proxy_headers=False,
      h11_max_incomplete_event_size=limits.HEADER_BYTES,
      timeout_keep_alive=limits.IDLE_SECONDS,
      timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    server = _Uvicorn(settings)
    self._worker.start()
    with _signals(self.end):
      serving = asyncio.ensure_future(server.serve([listener]))
      while not server.started and not serving.done():
        await asyncio.sleep(0.01)
      ready()
      ended = asyncio.ensure_future(wanted.wait())
      await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
      left = await self._drain()
      self._worker.stop()  # what is still open is told so
      server.should_exit = True
      await serving
      for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.to_thread(self._worker.join, _STEP_SECONDS)
    return self.metrics.totals() | {"unfinished": left, "seconds": time.monotonic() - began}

  async def _drain(self) -> int:
    """Waits until all requests are answered, the time is over or the end is wanted again; returns how many are not."""
    self._guard.ending = True
    until = time.monotonic() + self._drain_seconds
    log.info("ending: %d requests are being answered", self._guard.active)
    while self._guard.active and time.monotonic() < until and self._ends < 2 and self._worker.failure is None:
      await asyncio.sleep(PATIENCE)
    return self._guard.active


class _Uvicorn(uvicorn.Server):
  """uvicorn's, which leaves signals alone: it would raise them again at its end, and the exit code would not be 0."""

  @contextlib.contextmanager
  def capture_signals(self):
    yield


@contextlib.contextmanager
def _signals(end: Callable[[], None]):
  """Has SIGTERM and SIGINT want the end, where this is the main thread."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {number: signal.signal(number, lambda *_: end()) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
