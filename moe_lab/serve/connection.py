"""A connection with every wait bounded. uvicorn's own has a time-out between two requests and none within one."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_lab.serve import limits


class Connection(H11Protocol):
  """uvicorn's, which is aborted when its client is too slow to send a request's head or to read what is ready.

  What is closed with something unread in its buffer would stay for as long as the client likes; it is aborted too.
  """

  most = limits.Limits.connections  # that may be open at a time

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._head_timer: asyncio.TimerHandle | None = None
    self._write_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    if len(self.connections) > self.most:
      transport.abort()
    else:
      self._head_timer = self.loop.call_later(limits.HEADER_SECONDS, transport.abort)

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_head_timer()
    self._stop_write_timer()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.conn.their_state is not h11.IDLE:
      self._stop_head_timer()
    elif self._head_timer is None:
      self._head_timer = self.loop.call_later(limits.HEADER_SECONDS, self.transport.abort)
    if self.transport.is_closing():
      self._abort_later()

  def pause_writing(self) -> None:
    super().pause_writing()
    if self._write_timer is None:
      self._abort_later()

  def resume_writing(self) -> None:
    super().resume_writing()
    if not self.transport.is_closing():
      self._stop_write_timer()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    # A request whose body still comes after its answer has no time-out of uvicorn's.
    if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is not h11.SEND_RESPONSE:
      self.transport.close()
    if self.transport.is_closing():
      self._abort_later()

  def timeout_keep_alive_handler(self) -> None:
    super().timeout_keep_alive_handler()
    self._abort_later()

  def shutdown(self) -> None:
    super().shutdown()
    if self.transport.is_closing():
      self._abort_later()

  def _abort_later(self) -> None:
    if self._write_timer is None:
      self._write_timer = self.loop.call_later(limits.WRITE_SECONDS, self.transport.abort)

  def _stop_head_timer(self) -> None:
    if self._head_timer is not None:
      self._head_timer.cancel()
      self._head_timer = None

  def _stop_write_timer(self) -> None:
    if self._write_timer is not None:
      self._write_timer.cancel()
      self._write_timer = None
