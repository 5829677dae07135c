"""Clients of an engine that each wait for a response and then ask again: latencies under a load that never lets up."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request


@dataclasses.dataclass
class Answered:
  """One response, as its client saw it; times by a monotonic clock, in seconds.

  Attributes:
    kind: what the caller named its request.
    asked, first, last: when it was submitted, and when its first and its last token came.
    tokens: how many there were.
    experts: of the tokens together, each the mean over layers.
  """

  kind: str
  asked: float
  first: float = 0.0
  last: float = 0.0
  tokens: int = 0
  experts: float = 0.0

  @property
  def latency_s(self) -> float:
    return self.last - self.asked

  @property
  def first_token_s(self) -> float:
    return self.first - self.asked


@dataclasses.dataclass
class Window:
  """A stretch of time under full load.

  Attributes:
    seconds: its length.
    tokens: that were generated in it, of whole responses and of others.
    answered: responses that ended in it.
  """

  seconds: float
  tokens: int
  answered: list[Answered]


class ClosedLoop:
  """So many clients on one engine, whose slots they may share; in this process and thread, as the engine wants it."""

  def __init__(
    self,
    engine: Engine,
    requests: Iterator[tuple[str, Request]],
    clients: int,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Args: requests: without end, each with a name for its kind; clock: monotonic, in seconds."""
    self._engine, self._requests, self._clients, self._clock = engine, requests, clients, clock
    self._open: dict[int, Answered] = {}

  def warm_up(self) -> None:
    """Lets every client have a first response, which is not counted.

    First responses are cut to different lengths: clients that begin together and ask for equally many tokens would
    stay in step for ever, and all prompts would always be read at once.
    """
    for client in range(self._clients):
      self._ask(share=(client + 1) / self._clients)
    first = set(self._open)
    while first & set(self._open):
      self._step()

  def measure(self, responses: int) -> Window:
    """Serves on until so many more responses have ended."""
    started, tokens, answered = self._clock(), 0, []
    while len(answered) < responses:
      made, ended = self._step()
      tokens += made
      answered += ended
    return Window(self._clock() - started, tokens, answered)

  def end(self) -> None:
    """Has what is still open forgotten."""
    for ticket in self._open:
      self._engine.cancel(ticket)
    self._open.clear()

  def _ask(self, share: float = 1.0) -> None:
    kind, request = next(self._requests)
    request = dataclasses.replace(request, max_tokens=math.ceil(share * request.max_tokens))
    asked = self._clock()
    self._open[self._engine.submit(request)] = Answered(kind, asked)

  def _step(self) -> tuple[int, list[Answered]]:
    """Returns how many tokens came and the responses that they ended; their clients ask again at once."""
    made, ended = self._engine.step(), []
    now = self._clock()
    for ticket, token in made:
      answer = self._open[ticket]
      answer.first = answer.first if answer.tokens else now
      answer.last = now
      answer.tokens += 1
      answer.experts += token.experts
      if token.finish:
        ended.append(self._open.pop(ticket))
        self._ask()
    return len(made), ended
