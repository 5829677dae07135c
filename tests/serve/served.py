"""A server of a small random model on a thread, and what tests ask it with."""

import contextlib
import dataclasses
import functools
import json
import socket
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.data.tokenizer import train_tokenizer
from moe_lab.infer.engine import Engine
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.registry import make_router
from moe_lab.serve.server import Server

NAME = "small"
VOCAB = 360
CAPACITY = 256
SLOTS = 3
TEXTS = [f"def function_{i}(x):\n  return x + {i}  # höher als çela, 中文 und 😀\n" for i in range(200)]


@functools.cache
def tokenizer():
  with tempfile.TemporaryDirectory() as folder:
    return train_tokenizer(TEXTS, VOCAB, folder)


@functools.cache
def model():
  """Returns config, params, router_state."""
  small = ModelConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=5, expert_dim=6)
  config = Config(small, RoutingConfig(k_max=4, learner="value"), DataConfig(vocab_size=VOCAB))
  state = make_router(config.routing).initial_state(2, 5)
  token = jnp.ones((1, 4), jnp.int32)
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token, jnp.full(1, 2.0), state)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)["params"]
  return config, params, state


@functools.cache
def engine(**arguments) -> Engine:
  settings = dict(slots=SLOTS, capacity=CAPACITY, chunk=16, steps=4, decode=tokenizer().decode)
  return Engine(*model(), **settings | arguments)


@dataclasses.dataclass
class Running:
  """A server that answers; `result` is what it returned, once it has ended."""

  server: Server
  port: int
  thread: threading.Thread
  result: dict

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.port}"

  def end(self, seconds=30.0) -> dict:
    self.server.end()
    self.thread.join(seconds)
    assert not self.thread.is_alive()
    return self.result


@contextlib.contextmanager
def running(made: Engine, **arguments):
  """Yields a server on a free port of the loopback; made: an engine that serves nobody; arguments: of `Server`."""
  made.warm_up()
  listener = socket.create_server(("127.0.0.1", 0))
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # as the program has it, but less
  port = listener.getsockname()[1]
  server = Server(NAME, model()[0], tokenizer(), made, **arguments)
  ready, result = threading.Event(), {}
  thread = threading.Thread(target=lambda: result.update(server.run(listener, ready.set)), daemon=True)
  thread.start()
  assert ready.wait(30)
  try:
    yield Running(server, port, thread, result)
  finally:
    server.end()
    server.end()
    thread.join(30)


def ask(port: int, method: str, path: str, body=None, headers=None, raw: bytes | None = None):
  """Returns status, headers and content of one request, by nothing but a socket."""
  data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
  head = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(data))}
  head |= {"Content-Type": "application/json"} if data else {}
  lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in (head | (headers or {})).items() if v is not None)]
  with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
    connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + data)
    return answer_of(connection)


def answer_of(connection: socket.socket):
  """Returns status, headers and content of an answer that ends with the connection."""
  answer = b""
  while part := connection.recv(65536):
    answer += part
  top, _, content = answer.partition(b"\r\n\r\n")
  first, *lines = top.decode("latin-1").split("\r\n")
  headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
  if headers.get("transfer-encoding") == "chunked":
    content = _unchunked(content)
  if headers.get("content-type", "").startswith("application/json"):
    content = json.loads(content)
  return int(first.split()[1]), headers, content


def _unchunked(content: bytes) -> bytes:
  whole = b""
  while content:
    size, _, content = content.partition(b"\r\n")
    whole, content = whole + content[: int(size, 16)], content[int(size, 16) + 2 :]
  return whole
