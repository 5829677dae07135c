"""Writes on from prompts with the checkpoint of a run.

    python -m experiments.generate --workdir=runs/quickstart --prompt='def main(' --budget=2
    python -m experiments.generate --workdir=runs/quickstart --prompts=prompts.txt --slots=8 --steady
    python -m experiments.generate --workdir=runs/quickstart --chat

One prompt, or a talk with --chat, streams to stderr as it comes, in a terminal
coloured by the experts that each token took. A file of prompts is answered
many at a time; its responses go to a file of JSON lines. The result is the
last line on stdout.
"""

import contextlib
import dataclasses
import itertools
import signal
import sys
import time
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError, visible

FLAGS = flags.FlagValues()
flags.DEFINE_string("prompt", "", "Text to go on from; empty: the beginning of a document.", flag_values=FLAGS)
flags.DEFINE_string(
  "prompts",
  None,
  'A file of prompts, one a line; or .jsonl, an object a line: "prompt", and any of max_tokens to max_experts below.',
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "chat",
  False,
  "Ask for line after line; each goes on from all before, --prompt first. End: Ctrl-D.",
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "out", None, "With --prompts: the file of responses; by default PROMPTS.responses.jsonl.", flag_values=FLAGS
)
flags.DEFINE_integer("max_tokens", 128, "At most so many new tokens.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "Of sampling; 0 takes the most likely token.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens; 0: from all.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float(
  "top_p", 0.95, "Draw from the likeliest tokens that reach this probability.", 0, 1, flag_values=FLAGS
)
flags.DEFINE_float("min_p", 0.0, "Draw from tokens at least so likely, over the likeliest.", 0, 1, flag_values=FLAGS)
flags.DEFINE_multi_string("stop", [], "Text that ends a response; may be given several times.", flag_values=FLAGS)
flags.DEFINE_integer(
  "seed", 0, "Of sampling; each further prompt of a file or a talk takes the next.", flag_values=FLAGS
)
flags.DEFINE_float("budget", None, "Mean experts to ask for; by default the trained budget.", flag_values=FLAGS)
flags.DEFINE_integer("max_experts", None, "No token takes more experts.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool(
  "steady", False, "Hold the experts of each decoding step to slots x budget, hardest tokens first.", flag_values=FLAGS
)
flags.DEFINE_integer("slots", 8, "With --prompts: sequences at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("context", 2048, "With --chat: tokens that are remembered.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer(
  "resident_experts",
  None,
  "So many experts of a layer stay on the device; others are fetched from the host's memory. By default all stay.",
  lower_bound=0,
  flag_values=FLAGS,
)
flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.", flag_values=FLAGS)

LEAST_CAPACITY = 64  # tokens of a sequence that the cache has room for

# Blue to yellow, few to many experts: ANSI 256 colours of about equal lightness steps.
_COLOURS = (33, 37, 36, 35, 71, 107, 143, 178, 220)


def _coloured(text: str, experts: float, routing) -> str:
  share = (experts - routing.k_min) / max(routing.slots - routing.k_min, 1)
  colour = _COLOURS[round(min(max(share, 0), 1) * (len(_COLOURS) - 1))]
  return f"\x1b[38;5;{colour}m{text}\x1b[0m"


class _Model:
  """A loaded run that answers by the flags."""

  def __init__(self, text_model):
    self._text, self.loaded, self.tokens = text_model, text_model.loaded, text_model.tokens
    self.routing = self.loaded.config.routing

  def request(self, prompt: list[int], **changes):
    """Returns a request by the flags, and by what its line of a file says."""
    from moe_lab.infer.request import Request

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "max_experts")
    settings = {name: getattr(FLAGS, name) for name in names} | {
      "stop": tuple(FLAGS.stop),
      "budget": self.loaded.budget,
    }
    request = Request(prompt, stop_token=self._text.tokenizer.eos_id, **settings | changes)
    request.check(self.loaded.config)
    return request

  def engine(self, slots: int, capacity: int, steps: int):
    """Returns an engine for sequences of at least `capacity` tokens: powers of two, so that few are ever compiled."""
    capacity = max(1 << (capacity - 1).bit_length(), LEAST_CAPACITY)
    settings = {"steady": FLAGS.steady, "resident_experts": FLAGS.resident_experts}
    return self._text.engine(slots=slots, capacity=capacity, steps=steps, **settings)

  def result(self, responses: list, engine, seconds: float) -> dict:
    """Returns what every way of generating reports."""
    experts, log_probs = ([v for r in responses for v in getattr(r, name)] for name in ("experts", "log_probs"))
    return {
      "tokens": len(experts),
      "budget": self.loaded.budget,
      "mean_experts": sum(experts) / max(len(experts), 1),
      "mean_log_prob": sum(log_probs) / max(len(log_probs), 1),
      "tokens_per_second": len(experts) / seconds,
      "cache_bytes": engine.cache_bytes,
      "full_cache_bytes": engine.full_cache_bytes,
      "moved_expert_bytes": engine.offloaded.moved_bytes if engine.offloaded else 0,
      "step": self.loaded.step,
    }


def _stream(model: _Model, engine, request, response, stopped=lambda: False) -> None:
  """Writes a response to stderr as it comes, until it is `stopped`, and adds it to `response`."""
  in_colour = sys.stderr.isatty()
  with contextlib.closing(engine.generate([request])) as tokens:
    for _, token in tokens:
      response.add(token)
      text = visible(token.text)  # a model may write escape sequences, which a terminal would obey
      text = _coloured(text, token.experts, model.routing) if in_colour and text else text
      print(text, end="", file=sys.stderr, flush=True)
      if stopped():
        break
  print(file=sys.stderr)


@contextlib.contextmanager
def _counted_interrupts():
  """Yields a list that Ctrl-C lengthens; as an exception it would hit the engine while its cache is given away."""
  interrupts = []
  before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
  try:
    yield interrupts
  finally:
    signal.signal(signal.SIGINT, before)


def _legend(model: _Model) -> None:
  if sys.stderr.isatty():
    counts = range(max(model.routing.k_min, 1), model.routing.slots + 1)
    print("experts a token: " + " ".join(_coloured(str(n), n, model.routing) for n in counts), file=sys.stderr)


def _one(model: _Model) -> dict:
  from moe_lab.infer.responses import Response

  request = model.request(model.tokens(FLAGS.prompt))
  engine = model.engine(1, len(request.prompt) + request.max_tokens, steps=4)
  _legend(model)
  print(visible(FLAGS.prompt), end="", file=sys.stderr, flush=True)
  started, response = time.monotonic(), Response()
  _stream(model, engine, request, response)
  return {
    "text": response.text,
    "experts": response.experts,
    "log_probs": response.log_probs,
    "stopped": response.finish == "stop",
  } | model.result([response], engine, time.monotonic() - started)


def _chat(model: _Model) -> dict:
  """Goes on from all that was said; of a talk longer than the context the oldest part is forgotten.

  Ctrl-C ends a response, and between two the talk.
  """
  from moe_lab.infer.responses import Response

  if FLAGS.max_tokens >= FLAGS.context:
    raise UserError(f"--context={FLAGS.context}: wanted more than --max_tokens={FLAGS.max_tokens}")
  engine = model.engine(1, FLAGS.context, steps=4)
  _legend(model)
  sys.stdin.reconfigure(errors="surrogateescape")  # so that `tokens` has the word on what is not UTF-8
  said, responses, seconds = model.tokens(FLAGS.prompt), [], 0.0
  for turn in itertools.count():
    try:
      print("> ", end="", file=sys.stderr, flush=True)
      line = sys.stdin.readline()
    except KeyboardInterrupt:
      break
    if not line:
      break
    try:
      said += model.tokens(line)[1:]
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      continue
    request = model.request(said[-(FLAGS.context - FLAGS.max_tokens) :], seed=FLAGS.seed + turn)
    started, response = time.monotonic(), Response()
    with _counted_interrupts() as interrupts:
      _stream(model, engine, request, response, stopped=lambda: bool(interrupts))
    responses.append(response)
    seconds += time.monotonic() - started
    said += model.tokens(response.text + "\n")[1:]  # without a stop string, which nobody has seen
  return {"text": [r.text for r in responses], "turns": len(responses)} | model.result(
    responses, engine, max(seconds, 1e-9)
  )


def _responses_file() -> Path:
  return Path(FLAGS.out or f"{FLAGS.prompts}.responses.jsonl")


def _file(model: _Model, path: Path) -> dict:
  from moe_lab.infer.responses import finished, read_prompts
  from moe_lab.io.files import dump_json
  from moe_lab.io.progress import Count

  out = _responses_file()
  lines, requests = read_prompts(path), []
  for index, (place, text, changes) in enumerate(lines):
    try:
      requests.append(model.request(model.tokens(text), **{"seed": FLAGS.seed + index} | changes))
    except UserError as error:
      raise UserError(f"{place}: {error}") from None
  engine = model.engine(min(FLAGS.slots, len(requests)), max(len(r.prompt) + r.max_tokens for r in requests), steps=8)
  try:
    file = open(out, "x", encoding="utf-8", errors="replace")  # noqa: SIM115
  except FileExistsError:
    raise UserError(f"--out={out}: it is there already; wanted the name of a new file") from None
  except OSError as error:
    raise UserError(f"--out={out}: {error.strerror}") from None
  responses, started = [], time.monotonic()
  with file, Count("answered", len(requests)) as count:
    for index, response in finished(engine, requests):
      fields = {"index": index, "prompt": lines[index][1]} | dataclasses.asdict(response)
      print(dump_json(fields | {"mean_experts": response.mean_experts}), file=file, flush=True)
      responses.append(response)
      count.add()
  return {"prompts": len(requests), "file": out} | model.result(responses, engine, time.monotonic() - started)


def main(workdir: Path) -> dict:
  """Generates from the newest (or the asked) checkpoint in `workdir`."""
  if FLAGS.prompts and (FLAGS.chat or FLAGS.prompt):
    raise UserError(f"--prompts={FLAGS.prompts}: wanted without --prompt and --chat")
  for name, mode in (("out", "prompts"), ("slots", "prompts"), ("context", "chat")):
    if FLAGS[name].present and not getattr(FLAGS, mode):
      raise UserError(f"--{name}={getattr(FLAGS, name)}: wanted with --{mode} only")
  if FLAGS.prompts and (out := _responses_file()).exists():
    raise UserError(f"--out={out}: it is there already; wanted the name of a new file")
  from moe_lab.train.load import load_text_model

  in_host = FLAGS.resident_experts is not None  # or all would be on the device at first
  model = _Model(load_text_model(workdir, FLAGS.step, FLAGS.budget, in_host))
  if FLAGS.prompts:
    result = _file(model, Path(FLAGS.prompts))
  else:
    result = _chat(model) if FLAGS.chat else _one(model)
  return result | {"workdir": workdir}


if __name__ == "__main__":
  program.run(main, FLAGS, one_arena=False)
