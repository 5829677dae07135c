"""Serves the checkpoint of a run over HTTP, as OpenAI's clients expect it, with a page at /.

    python -m experiments.serve --workdir=runs/quickstart
    python -m experiments.serve --workdir=runs/any --port=8080 --slots=32 --context=4096 --budget=3
    MOE_LAB_API_KEY=... python -m experiments.serve --workdir=runs/any --host=0.0.0.0

SIGTERM or Ctrl-C ends it: requests that are being answered are finished, new
ones refused; a second one ends it at once. The result, the totals, is the last
line on stdout. Needs the extra `serve`.
"""

import ipaddress
import os
import socket
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import RunError, UserError, require

KEY_VARIABLE = "MOE_LAB_API_KEY"
SEND_BUFFER = 256 << 10  # bytes

FLAGS = flags.FlagValues()
flags.DEFINE_string("host", "127.0.0.1", "The address to listen at; another than this machine's own wants a key.",
                    flag_values=FLAGS)  # fmt: skip
flags.DEFINE_integer("port", 8000, "The port; 0: any that is free, told on stderr.", 0, 65535, flag_values=FLAGS)
flags.DEFINE_string("name", None, "What clients call the model; by default the name of --workdir.", flag_values=FLAGS)
flags.DEFINE_integer("slots", 16, "Responses that are written together.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("context", 2048, "Tokens of a prompt and its response.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_float("budget", None, "Mean experts where a request asks for none; by default the trained budget.",
                   flag_values=FLAGS)  # fmt: skip
flags.DEFINE_bool("steady", False, "Hold the experts of each decoding step to slots x budget, hardest tokens first.",
                  flag_values=FLAGS)  # fmt: skip
flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.", flag_values=FLAGS)
flags.DEFINE_string("api_key_file", None, f"A file with the key that clients must have; or set {KEY_VARIABLE}.",
                    flag_values=FLAGS)  # fmt: skip
flags.DEFINE_bool("without_key", False, "Serve other machines although there is no key.", flag_values=FLAGS)
flags.DEFINE_integer("queue", 64, "Responses that may wait for a slot; more are refused.", 0, 10_000, flag_values=FLAGS)
flags.DEFINE_integer("connections", 256, "That may be open at a time.", 1, 100_000, flag_values=FLAGS)
flags.DEFINE_float("request_seconds", 300.0, "That a request may take, waiting included.", lower_bound=1,
                   flag_values=FLAGS)  # fmt: skip
flags.DEFINE_float("drain_seconds", 30.0, "For what is being answered when the end is wanted.", lower_bound=0,
                   flag_values=FLAGS)  # fmt: skip


def _key() -> str | None:
  """Returns the key that clients must have; None: none."""
  key, place = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
  if FLAGS.api_key_file is not None:
    place = f"--api_key_file={FLAGS.api_key_file}"
    try:
      key = Path(FLAGS.api_key_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"{place}: wanted a file with a key ({error})") from None
  if key is None:
    return None
  key = key.strip()
  if not key.isascii() or not key.isprintable() or not key or " " in key:
    raise UserError(f"{place}: wanted a key of printable ASCII characters without spaces")
  return key


def _address(key: str | None) -> tuple[int, tuple, bool]:
  """Returns the family and address to bind, and whether it is this machine's own."""
  try:
    family, _, _, _, address = socket.getaddrinfo(FLAGS.host, FLAGS.port, type=socket.SOCK_STREAM)[0]
  except OSError as error:
    raise UserError(f"--host={FLAGS.host}: wanted a name or an address ({error.strerror})") from None
  loopback = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
  if not loopback and key is None and not FLAGS.without_key:
    wanted = f"a key for other machines' clients (--api_key_file or {KEY_VARIABLE}), or --without_key"
    raise UserError(f"--host={FLAGS.host}: wanted {wanted}")
  return family, address, loopback


def _listener(family: int, address: tuple) -> socket.socket:
  listener = socket.socket(family, socket.SOCK_STREAM)
  try:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Of each connection: what the system keeps for a client that does not read, 4 MB and more where nothing is said.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.bind(address)
    listener.listen(128)  # here, so that a port that another holds is told before a model is loaded
  except OSError as error:
    listener.close()
    raise RunError(f"--port={FLAGS.port}: cannot listen at {FLAGS.host} ({error.strerror})") from None
  return listener


def main(workdir: Path) -> dict:
  """Serves the newest (or the asked) checkpoint in `workdir` until SIGTERM; returns the totals."""
  for package in ("fastapi", "uvicorn", "prometheus_client"):
    require(package, "a server", "serve")
  key = _key()
  family, address, loopback = _address(key)
  with _listener(family, address) as listener:
    from moe_lab.serve.limits import Limits
    from moe_lab.serve.server import Server
    from moe_lab.train.load import load_text_model

    model = load_text_model(workdir, FLAGS.step, FLAGS.budget)
    engine = model.engine(slots=FLAGS.slots, capacity=FLAGS.context, steady=FLAGS.steady)
    print(f"compiling for {FLAGS.slots} slots; requests wait until it is done", file=sys.stderr, flush=True)
    engine.warm_up()
    name = FLAGS.name or workdir.resolve().name.encode("utf-8", "replace").decode()
    server = Server(
      name, model.loaded.config, model.tokenizer, engine, key=key, loopback=loopback,
      bounds=Limits(FLAGS.queue, FLAGS.connections, FLAGS.request_seconds), drain_seconds=FLAGS.drain_seconds,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    closed = "with a key" if key else "without a key"

    def ready():
      print(f"{name} at {where}, {closed}; Ctrl-C ends it", file=sys.stderr, flush=True)

    return server.run(listener, ready) | {"step": model.loaded.step, "workdir": workdir}


if __name__ == "__main__":
  program.run(main, FLAGS, one_arena=False)
