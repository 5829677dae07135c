"""One request's answer: whole, or as a stream; given up as soon as its client is gone."""

import asyncio
import logging
from collections.abc import Callable

from starlette.responses import Response

from moe_lab.serve.forms import Form
from moe_lab.serve.refusals import Refusal, json_bytes, json_response
from moe_lab.serve.worker import Arrived, Job, Worker

log = logging.getLogger("moe_lab.serve")


class _Left(Exception):
  """The client is gone."""


class Answer(Response):
  """Has a job served and sends what comes of it."""

  def __init__(
    self, worker: Worker, job: Job, form: Form, *, stream: bool, seconds: float, gave_up: Callable[[], None]
  ):
    """Sets it up; nothing is submitted before it is sent.

    Args:
      worker: that serves the job.
      job: what is asked.
      form: how its tokens are written.
      stream: whether as server-sent events.
      seconds: that it may take.
      gave_up: called if the client is gone before the end.
    """
    super().__init__()
    self._worker, self._job, self._form = worker, job, form
    self._stream, self._seconds, self._gave_up = stream, seconds, gave_up

  async def __call__(self, scope, receive, send) -> None:
    gone = asyncio.ensure_future(_gone(receive))

    async def send_if_there(message):
      if gone.done():
        raise _Left  # uvicorn lets what is sent then disappear
      await send(message)

    answer = asyncio.ensure_future(self._send_guarded(scope, receive, send_if_there))
    try:
      await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
      if not answer.done() or isinstance(answer.exception(), _Left):
        self._gave_up()
    finally:
      # At once: whoever was to read this is not there any more, or has it.
      self._worker.cancel(self._job)
      answer.cancel()
      gone.cancel()
      await asyncio.gather(answer, gone, return_exceptions=True)

  async def _send_guarded(self, scope, receive, send) -> None:
    """Sends the answer, or what went wrong, in whichever way is still open."""
    begun = False

    async def noted(message):
      nonlocal begun
      begun = True
      await send(message)

    try:
      async with asyncio.timeout(self._seconds):
        self._worker.submit(self._job)
        await (self._send_stream(noted) if self._stream else self._send_whole(scope, receive, noted))
      return
    except TimeoutError:
      refusal = Refusal(503, f"the request took more than {self._seconds:g} s", code="timeout")
    except Refusal as error:
      refusal = error
    except _Left:
      raise
    except Exception as error:  # a bug; its traceback has no prompt in it, and the client need not wait
      log.error("an answer failed", exc_info=error)
      refusal = Refusal(500, "the server made a mistake", code="internal_error")
    if not begun:
      await refusal.response()(scope, receive, send)
    elif self._stream:
      await send(_body(_event(refusal.content), more=False))

  async def _send_whole(self, scope, receive, send) -> None:
    async for arrived in self._job.arrivals():
      for index, token in arrived:
        self._form.collect(index, token)
    await json_response(self._form.whole())(scope, receive, send)

  async def _send_stream(self, send) -> None:
    begun = False
    async for arrived in self._job.arrivals():
      if not begun:  # not sooner: until the first token an error can still be a status
        begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
      await send(_body(self._events(arrived)))
    last = self._form.last_chunk()
    await send(_body((_event(last) if last else b"") + b"data: [DONE]\n\n", more=False))

  def _events(self, arrived: Arrived) -> bytes:
    return b"".join(_event(self._form.chunk(index, token)) for index, token in arrived)


async def _gone(receive) -> None:
  """Returns when the client is gone; the body has been read."""
  while (await receive())["type"] != "http.disconnect":
    pass


def _event(content: dict) -> bytes:
  return b"data: " + json_bytes(content) + b"\n\n"


def _body(data: bytes, more: bool = True) -> dict:
  return {"type": "http.response.body", "body": data, "more_body": more}
