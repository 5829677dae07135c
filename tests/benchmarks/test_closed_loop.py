"""Clients that wait for their answers, on an engine that makes a token a second."""

import itertools

import pytest

from benchmarks.closed_loop import ClosedLoop
from moe_lab.infer.engine import Token
from moe_lab.infer.request import Request


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


class FakeEngine:
  """Makes a token of each request in a second, the first one two seconds after it was asked."""

  def __init__(self, clock):
    self.clock, self.open, self.asked, self.most, self.cancelled = clock, {}, [], 0, []

  def submit(self, request):
    ticket = len(self.asked)
    self.asked.append(request.max_tokens)
    self.open[ticket] = [request.max_tokens, self.clock.now]
    self.most = max(self.most, len(self.open))
    return ticket

  def step(self):
    self.clock.now += 1
    made = []
    for ticket, (left, asked) in list(self.open.items()):
      if self.clock.now - asked < 2:
        continue
      self.open[ticket][0] = left - 1
      if left == 1:
        del self.open[ticket]
      made.append((ticket, Token(7, -1.0, 1.5, "", "length" if left == 1 else None)))
    return made

  def cancel(self, ticket):
    self.cancelled.append(ticket)
    del self.open[ticket]


def requests():
  for number in itertools.count():
    yield ("easy", "hard")[number % 2], Request([1], max_tokens=8)


@pytest.mark.parametrize("clients", [1, 4])
def test_latencies_under_a_steady_load(clients):
  clock = Clock()
  engine = FakeEngine(clock)
  loop = ClosedLoop(engine, requests(), clients, clock)
  loop.warm_up()
  # The last client's first response, of full length, is there; those before it were shorter.
  assert engine.asked[:clients] == [2, 4, 6, 8][-clients:] if clients == 4 else engine.asked[0] == 8
  assert clock.now == 9 and engine.most == clients
  window = loop.measure(12)
  assert len(window.answered) == 12 and len(engine.open) == clients == engine.most
  for answer in window.answered:
    # Nobody waits for a slot here: the first token after two seconds, seven more a second each.
    assert (answer.first_token_s, answer.latency_s, answer.tokens, answer.experts) == (2, 9, 8, 12)
  # A client makes 8 tokens in 9 seconds, and the window has those of responses that go on after it, too.
  assert window.seconds == clock.now - 9
  assert window.tokens == pytest.approx(window.seconds * clients * 8 / 9, abs=clients)
  assert {answer.kind for answer in window.answered} == {"easy", "hard"}
  if clients > 1:  # they don't go in step
    assert len({answer.last for answer in window.answered}) > 6
  loop.end()
  assert not engine.open and len(engine.cancelled) == clients
