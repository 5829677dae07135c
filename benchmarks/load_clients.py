"""Clients that load a server, each in its own way, over plain sockets: they must not take the cores from it."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

KINDS = ("whole", "stream", "slow", "stalled", "hung_up")
SHARES = (0.4, 0.5, 0.04, 0.02, 0.04)  # of each kind
KEPT = ("whole", "stream", "slow")  # these read their answer to the end
PROMPT, NEW = (1, 200), (16, 384)  # tokens, least and most
_IDS = (4, 2000)  # of the prompts' tokens
_SLOW_BYTES, _SLOW_SECONDS = 2048, 0.05  # a slow reader takes so much and then pauses: 40 kB/s
_STALLED_SECONDS = 5.0


class Place(Protocol):
  """Where a server is: what it calls its model, and its port."""

  name: str
  port: int


class Outcome(NamedTuple):
  """What came of a request.

  Attributes:
    kind: of its client.
    status: of the answer; 0: none came.
    well: whether all was read that this client wanted.
    tokens: that it got.
    first_seconds: until the first token of a stream; None elsewhere.
    seconds: until the end.
  """

  kind: str
  status: int
  well: bool
  tokens: int
  first_seconds: float | None
  seconds: float


def body(rng: random.Random, kind: str) -> dict:
  """Returns a request; the longer a length the rarer, as with people's."""
  prompt = [rng.randint(*_IDS) for _ in range(_length(rng, *PROMPT))]
  fields = {"max_tokens": _length(rng, *NEW), "temperature": rng.choice((0.0, 0.8, 1.0)), "top_p": 0.95}
  fields |= {"seed": rng.randint(0, 2**31 - 1), "stream": kind not in ("", "whole")}
  if rng.random() < 0.25:
    words = " ".join(rng.choice(("what", "is", "the", "value", "of", "x")) for _ in range(len(prompt) // 4 + 1))
    return fields | {"messages": [{"role": "user", "content": words}], "top_logprobs": rng.choice((0, 5))}
  return fields | {"prompt": prompt, "n": rng.choice((1, 1, 1, 2))}


def _length(rng: random.Random, least: int, most: int) -> int:
  return round(least * (most / least) ** rng.random())


async def all_of(server: Place, bodies: Sequence[dict], at_a_time: int) -> list[Outcome]:
  """Returns the outcomes of requests of which so many are asked at a time."""
  turn = asyncio.Semaphore(at_a_time)

  async def one(fields: dict) -> Outcome:
    async with turn:
      return await ask(server, fields, "whole")

  return await asyncio.gather(*map(one, bodies))


async def until(server: Place, clients: int, end: float) -> list[Outcome]:
  """Returns the outcomes of clients that ask one request after another until a moment of the monotonic clock."""
  outcomes = []

  async def client(number: int) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
      kind = rng.choices(KINDS, SHARES)[0]
      outcomes.append(await ask(server, body(rng, kind), kind, rng.random()))

  await asyncio.gather(*map(client, range(clients)))
  return outcomes


async def get(server: Place, path: str) -> str:
  """Returns the text at a place."""
  reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
  writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
  answer = await reader.read()
  writer.close()
  return answer.partition(b"\r\n\r\n")[2].decode()


async def ask(server: Place, fields: dict, kind: str, chance: float = 0.5) -> Outcome:
  """Returns the outcome of a request; `chance` from 0 to 1 decides when who hangs up does so."""
  path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
  data = json.dumps({"model": server.name} | fields).encode()
  head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
  began = time.monotonic()
  connection = socket.socket()
  connection.setblocking(False)
  if kind in ("slow", "stalled"):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
  await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
  reader, writer = await asyncio.open_connection(sock=connection, limit=4096 if kind in ("slow", "stalled") else 65536)
  try:
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    if kind == "stalled":
      await asyncio.sleep(_STALLED_SECONDS)
      return Outcome(kind, 0, True, 0, None, time.monotonic() - began)
    if kind == "hung_up":
      with_answer = reader.read(1 + int(3000 * chance)) if chance > 0.5 else asyncio.sleep(chance)
      await asyncio.wait_for(with_answer, 60)
      return Outcome(kind, 0, True, 0, None, time.monotonic() - began)
    return await _read(reader, fields, kind, began)
  except (OSError, TimeoutError):
    return Outcome(kind, 0, kind not in KEPT, 0, None, time.monotonic() - began)
  finally:
    writer.transport.abort() if kind not in KEPT else writer.close()


async def _read(reader: asyncio.StreamReader, fields: dict, kind: str, began: float) -> Outcome:
  first, parts = None, []
  while part := await reader.read(_SLOW_BYTES if kind == "slow" else 65536):
    if first is None and fields["stream"]:
      first = time.monotonic() - began  # the head comes with the first token
    parts.append(part)
    if kind == "slow":
      await asyncio.sleep(_SLOW_SECONDS)
  seconds, answer = time.monotonic() - began, b"".join(parts)
  status = int(answer[9:12] or 0)
  if status != 200:
    return Outcome(kind, status, False, 0, None, seconds)
  if fields["stream"]:
    tokens = answer.count(b"data: {")
    ends = answer.count(b'"finish_reason":"')
    well = ends == fields.get("n", 1) and b"data: [DONE]" in answer[-64:] and answer.endswith(b"0\r\n\r\n")
    return Outcome(kind, status, well, tokens, first, seconds)
  reply = json.loads(answer.partition(b"\r\n\r\n")[2])
  well = len(reply["choices"]) == fields.get("n", 1) and all(choice["finish_reason"] for choice in reply["choices"])
  return Outcome(kind, status, well, reply["usage"]["completion_tokens"], first, seconds)
