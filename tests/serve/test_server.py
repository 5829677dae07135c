"""What a client may not do and is told; and how requests, connections and the server end."""

import json
import socket
import time

import pytest

pytest.importorskip("fastapi")

from moe_lab.serve import limits, worker  # noqa: E402
from moe_lab.serve.limits import Limits  # noqa: E402
from tests.serve.served import NAME, SLOTS, answer_of, ask, engine, running  # noqa: E402

KEY = "secret-of-this-test"
ASKED = {"model": NAME, "prompt": "x", "max_tokens": 2, "temperature": 0}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def served():
  with running(engine(), key=KEY, bounds=Limits(queue=2, connections=8)) as server:
    yield server


def ask_with_key(served, method, path, body=None, **more):
  headers = {"Authorization": f"Bearer {KEY}"} | more.pop("headers", {})
  return ask(served.port, method, path, body, headers=headers, **more)


def message(answer) -> str:
  status, headers, content = answer
  assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
  return f"{status} {content['error']['message']}"


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff"])
@pytest.mark.parametrize("method, path", [("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics")])
def test_a_key_is_wanted(served, method, path, given):
  answer = ask(served.port, method, path, ASKED if method == "POST" else None, headers={"Authorization": given})
  assert message(answer) == "401 wanted the right key in the header Authorization: Bearer KEY"
  assert answer[1]["www-authenticate"] == "Bearer" and answer[2]["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json"])
def test_what_is_open_without_a_key(served, path):
  assert ask(served.port, "GET", path)[0] == 200


@pytest.mark.parametrize(
  "path", ["/v1", "/%761/models", "//v1/models", "/v1/models/", "/../metrics", "/docs", "/nothing"]
)
def test_all_else_is_closed(served, path):
  assert ask(served.port, "GET", path)[0] == 401


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""])
def test_a_name_that_was_made_to_point_here_is_refused(served, host):
  assert ask(served.port, "GET", "/", headers={"Host": host})[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_the_machines_own_names_are_taken(served, host):
  assert ask(served.port, "GET", "/healthz", headers={"Host": host})[0] == 200


def test_a_page_of_another_site_gets_nothing(served):
  _, headers, _ = ask_with_key(served, "OPTIONS", COMPLETIONS, headers={"Origin": "https://evil.example"})
  assert not [name for name in headers if name.startswith("access-control")]
  # Without a preflight a page may send text only, which is not taken.
  answer = ask_with_key(served, "POST", COMPLETIONS, ASKED, headers={"Content-Type": "text/plain"})
  assert message(answer) == "400 the body: wanted a JSON object, with the header Content-Type: application/json"


@pytest.mark.parametrize(
  "body, words",
  [
    (b"", "400 the body: wanted a JSON object"),
    (b"{", "400 the body: wanted JSON (Expecting property name"),
    (b"[" * 100_000, "400 the body cannot be read"),
    (b"1" * 10_000, "400 the body cannot be read"),
    (b'{"model": "\xff"}', "400 the body cannot be read"),
    (b"[1]", "400 the body: wanted a JSON object"),
    (b'{"model": "small"}', "400 prompt: wanted it"),
    (b'{"prompt": "x"}', "400 model: wanted it"),
    (b'{"model": "small", "prompt": "x", "temperature": NaN}', "400 temperature = nan: "),
    (b'{"model": "small", "prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "400 temperature = 1"),
    (b'{"model": "small", "prompt": "\\ud800"}', "400 prompt: wanted text in UTF-8, but character 1 is none"),
    (b'{"model": "small", "prompt": "x", "\\ud800": 1}', "400 \\ud800: no such field here"),
    (b'{"model": "small", "prompt": "x", "a\\r\\nb": 1}', "400 a\\r\\nb: no such field here"),
    (b'{"model": "small", "prompt": "x", "stop": ["a", ""]}', "400 stop = ['a', '']: wanted text, or up to 16 texts"),
    (b'{"model": "small", "prompt": "x", "seed": true}', "400 seed = True: "),
    (b'{"model": "small", "prompt": [' + b'"x",' * 17 + b'"x"]}', "400 prompt = "),
    (b'{"model": "small", "prompt": [' + b"[]," * 300_000 + b"[]]}", "400 prompt = "),
    (b'{"model": "small", ' + b",".join(b'"a%d": 1' % i for i in range(70_000)) + b"}", "400 a0: no such field here"),
    (b"x" * (limits.BODY_BYTES + 1), f"413 the body: wanted at most {limits.BODY_BYTES:,} bytes"),
  ],
)
def test_a_body_that_is_none(served, body, words):
  began = time.monotonic()
  answer = ask_with_key(served, "POST", COMPLETIONS, raw=body, headers={"Content-Type": "application/json"})
  assert message(answer).startswith(words)
  assert time.monotonic() - began < 20  # a million mistakes are not told one by one


def test_a_body_may_be_as_long_as_is_said(served):
  whole = json.dumps(ASKED).encode()
  assert ask_with_key(served, "POST", COMPLETIONS, raw=whole + b" " * (limits.BODY_BYTES - len(whole)))[0] == 200


def test_a_body_that_does_not_say_its_length_is_bounded_too(served):
  head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked"
  with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
    connection.sendall(head.encode() + b"\r\n\r\n")
    for _ in range(17):
      connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    connection.sendall(b"0\r\n\r\n")
    assert answer_of(connection)[0] == 413


@pytest.mark.parametrize(
  "head",
  [
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\nb\0c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2 * limits.HEADER_BYTES,
  ],
)
def test_what_two_servers_might_read_in_two_ways_ends_the_connection(served, head):
  with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
    connection.sendall(head)
    status, headers, _ = answer_of(connection)
  assert status in (400, 501) and headers["connection"] == "close"


def test_a_full_queue_is_told_at_once(served):
  long = ASKED | {"max_tokens": 250, "stream": True}
  most = SLOTS + 2
  answer = ask_with_key(served, "POST", COMPLETIONS, ASKED | {"n": most + 1})
  assert message(answer) == f"400 n = {most + 1}: wanted at most {most} responses a request, n for each prompt, not 6"
  with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
    body = json.dumps(long | {"n": most}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    assert connection.recv(10)  # it has begun
    answer = ask_with_key(served, "POST", COMPLETIONS, ASKED)
  assert message(answer) == f"429 all {SLOTS} slots and the queue are taken; try again soon"
  assert answer[1]["retry-after"] == "1" and answer[2]["error"]["type"] == "rate_limit_error"
  assert _until(lambda: ask_with_key(served, "POST", COMPLETIONS, ASKED)[0] == 200)


def test_too_many_connections_are_closed(served):
  held = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(8)]
  time.sleep(0.2)
  with pytest.raises((ConnectionError, IndexError)):
    ask(served.port, "GET", "/healthz")
  for connection in held:
    connection.close()
  assert _until(lambda: ask(served.port, "GET", "/healthz")[0] == 200)


@pytest.mark.parametrize(
  "setting, sent",
  [
    ("HEADER_SECONDS", b""),
    ("HEADER_SECONDS", b"GET / HTTP/1.1\r\nHost: local"),
    ("BODY_SECONDS", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc"),
  ],
)
def test_who_dawdles_is_dropped(served, monkeypatch, setting, sent):
  monkeypatch.setattr(limits, setting, 0.3)
  with socket.create_connection(("127.0.0.1", served.port), timeout=40) as connection:
    connection.sendall(sent)
    answer = _ends(connection)  # or the test's own time-out raises
  assert (b" 401 " in answer) == (setting == "BODY_SECONDS")


def test_an_answer_takes_no_longer_than_allowed():
  with running(engine(), bounds=Limits(seconds=0.001)) as server:
    answer = ask(server.port, "POST", COMPLETIONS, ASKED | {"max_tokens": 200})
    assert message(answer) == "503 the request took more than 0.001 s"


def test_who_dawdles_with_a_second_request_is_dropped(served, monkeypatch):
  monkeypatch.setattr(limits, "HEADER_SECONDS", 0.3)
  with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /he")
    assert b"HTTP" not in _ends(connection)  # the end of the first answer at most


@pytest.fixture
def slow(monkeypatch):
  """An engine whose steps take a while."""
  step = engine().step
  monkeypatch.setattr(engine(), "step", lambda: time.sleep(0.05) or step())
  return engine()


def begin(port: int, body: dict, path=COMPLETIONS, receive_bytes: int | None = None) -> socket.socket:
  """Sends a request and leaves its answer unread."""
  connection = socket.socket()
  connection.settimeout(60)
  if receive_bytes:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
  connection.connect(("127.0.0.1", port))
  data = json.dumps(body).encode()
  head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
  connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
  return connection


def cancelled(server) -> int:
  return server.server.metrics.totals()["cancelled"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_slot(slow, stream):
  with running(slow) as server:
    connection = begin(server.port, ASKED | {"max_tokens": 250, "stream": stream, "n": 2})
    assert _until(lambda: slow.num_serving == 2)
    if stream:
      assert connection.recv(100)
    connection.close()
    assert _until(lambda: slow.num_serving == 0)
    assert cancelled(server) == 1 and server.server.metrics.totals()["tokens"] < 2 * 250
    assert ask(server.port, "POST", COMPLETIONS, ASKED)[0] == 200


def test_who_hangs_up_while_waiting_is_forgotten(slow):
  with running(slow) as server:
    first = begin(server.port, ASKED | {"max_tokens": 100, "n": SLOTS})
    assert _until(lambda: slow.num_serving == SLOTS)
    second = begin(server.port, ASKED)
    assert _until(lambda: slow.num_waiting == 1)
    second.close()
    assert _until(lambda: slow.num_waiting == 0) and slow.num_serving == SLOTS
    assert answer_of(first)[0] == 200 and cancelled(server) == 1


def test_who_does_not_read_holds_nobody_up_and_is_dropped(monkeypatch):
  monkeypatch.setattr(limits, "WRITE_SECONDS", 3.0)
  talk = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "n": SLOTS, "temperature": 0, "stream": True}
  with running(engine()) as server:
    connection = begin(
      server.port, talk | {"max_tokens": 200, "top_logprobs": 20}, "/v1/chat/completions", receive_bytes=4096
    )
    assert _until(lambda: engine().num_serving == 0 and server.server.metrics.totals()["tokens"] == SLOTS * 200)
    assert ask(server.port, "POST", COMPLETIONS, ASKED)[0] == 200
    assert _until(lambda: cancelled(server) == 1)
    assert b"[DONE]" not in _ends(connection)
    assert server.end()["unfinished"] == 0


def test_what_is_being_answered_is_finished_before_the_end(slow):
  with running(slow) as server:
    connection = begin(server.port, ASKED | {"max_tokens": 100, "stream": True})
    assert _until(lambda: slow.num_serving == 1)
    server.server.end()
    assert message(ask(server.port, "POST", COMPLETIONS, ASKED)) == "503 the server is ending"
    assert message(ask(server.port, "GET", "/healthz")) == "503 the server is ending"
    status, _, content = answer_of(connection)
    assert status == 200 and content.count(b"data: {") == 100 and content.endswith(b"data: [DONE]\n\n")
    server.thread.join(30)
  assert server.result["unfinished"] == 0 and server.result["requests"] == {"200": 1, "503": 2}
  assert server.result["tokens"] == 100


@pytest.mark.parametrize("drain_seconds, ends", [(0.3, 1), (60, 2)])
def test_the_end_does_not_wait_for_ever(slow, drain_seconds, ends):
  with running(slow, drain_seconds=drain_seconds) as server:
    whole = begin(server.port, ASKED | {"max_tokens": 250})
    stream = begin(server.port, ASKED | {"max_tokens": 250, "stream": True})
    assert _until(lambda: slow.num_serving == 2) and stream.recv(10)
    for _ in range(ends):
      server.server.end()
    assert message(answer_of(whole)) == "503 the server is ending"
    told = _ends(stream)
    assert b'"the server is ending"' in told and b"[DONE]" not in told
    server.thread.join(30)
  assert server.result["unfinished"] == 2 and slow.num_serving == 0


def test_a_failed_engine_is_told_to_all(monkeypatch, caplog):
  step, steps = engine().step, []

  def failing():
    steps.append(True)
    if len(steps) > 3:
      raise RuntimeError("out of order")
    return step()

  with running(engine()) as server:
    monkeypatch.setattr(engine(), "step", failing)
    prompt = "never to be logged"
    stream = begin(server.port, ASKED | {"prompt": prompt, "max_tokens": 200, "stream": True})
    told = _ends(stream)
    assert b'"the engine failed"' in told and b"[DONE]" not in told
    assert message(ask(server.port, "GET", "/healthz")) == "503 the engine has failed (RuntimeError)"
    assert message(ask(server.port, "POST", COMPLETIONS, ASKED)) == "503 the engine has failed (RuntimeError)"
    assert server.end()["tokens"] > 0
  assert "out of order" in caplog.text and prompt not in caplog.text
  _forget_all()


def test_an_engine_that_fails_before_the_first_token_gives_a_status(monkeypatch):
  def failing():
    raise MemoryError

  with running(engine()) as server:
    monkeypatch.setattr(engine(), "step", failing)
    for stream in (False, True):
      answer = ask(server.port, "POST", COMPLETIONS, ASKED | {"stream": stream})
      assert answer[0] == (503 if stream else 500) and answer[2]["error"]["type"] == "server_error"
  _forget_all()


def test_an_engine_that_hangs_is_not_healthy(monkeypatch):
  monkeypatch.setattr(worker, "STUCK_SECONDS", 0.2)
  step = engine().step
  monkeypatch.setattr(engine(), "step", lambda: time.sleep(1.5) or step())
  with running(engine()) as server:
    connection = begin(server.port, ASKED)
    assert _until(lambda: ask(server.port, "GET", "/healthz")[0] == 503)
    assert answer_of(connection)[0] == 200
    assert ask(server.port, "GET", "/healthz")[0] == 200


def _forget_all():
  """Leaves the engine as if it had not failed."""
  for ticket in range(engine()._next_ticket):
    engine().cancel(ticket)


def _ends(connection: socket.socket) -> bytes:
  """Returns what comes until the connection ends, in whichever way."""
  answer = b""
  try:
    while part := connection.recv(65536):
      answer += part
  except ConnectionResetError:
    pass
  return answer


def _until(condition, seconds=20.0) -> bool:
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    try:
      if condition():
        return True
    except (ConnectionError, IndexError):
      pass
    time.sleep(0.05)
  return False
