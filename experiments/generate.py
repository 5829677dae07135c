"""Writes on from prompts with the checkpoint of a run.

    python -m experiments.generate --workdir=runs/quickstart --prompt='def main(' --budget=2
    python -m experiments.generate --workdir=runs/quickstart --prompts=prompts.txt --slots=8 --steady
    python -m experiments.generate --workdir=runs/quickstart --chat

One prompt, or a talk with --chat, streams to stderr as it comes, in a terminal
coloured by the experts that each token took. A file of prompts is answered
many at a time; its responses go to a file of JSON lines. The result is the
last line on stdout.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("prompt", "", "Text to go on from; empty: the beginning of a document.", flag_values=FLAGS)
flags.DEFINE_string(
  "prompts", None, "A file of prompts, one a line; or .jsonl, with fields of this page's flags.", flag_values=FLAGS
)
flags.DEFINE_bool(
  "chat", False, "Ask for line after line; each goes on from all before. End: Ctrl-D.", flag_values=FLAGS
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
  "steady", False, "Hold the experts of each step to slots x budget, hardest tokens first.", flag_values=FLAGS
)
flags.DEFINE_integer("slots", 8, "With --prompts: sequences at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("context", 2048, "With --chat: tokens that are remembered.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.", flag_values=FLAGS)

# Blue to yellow, few to many experts: ANSI 256 colours of about equal lightness steps.
_COLOURS = (33, 37, 36, 35, 71, 107, 143, 178, 220)


def _coloured(text: str, experts: float, routing) -> str:
  share = (experts - routing.k_min) / max(routing.slots - routing.k_min, 1)
  colour = _COLOURS[round(min(max(share, 0), 1) * (len(_COLOURS) - 1))]
  return f"\x1b[38;5;{colour}m{text}\x1b[0m"


class _Model:
  """A loaded run that answers."""

  def __init__(self, workdir: Path):
    from moe_lab.data.tokenizer import load_tokenizer
    from moe_lab.train.load import load_model

    self.loaded = load_model(workdir, FLAGS.step, FLAGS.budget)
    path = workdir / "tokenizer.model"
    if not path.exists():
      raise UserError(
        f"{workdir} has no tokenizer.model: it was trained on a synthetic task, which has no text to generate"
      )
    self.tokenizer = load_tokenizer(str(path), self.loaded.config.data.vocab_size)
    self.loaded.check_fingerprint(self.tokenizer.fingerprint)
    self.routing = self.loaded.config.routing

  def tokens(self, text: str) -> list[int]:
    return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]

  def request(self, prompt: list[int], **changes):
    """Returns a request by the flags, and by what its line of a file says."""
    from moe_lab.infer.engine import Request
    from moe_lab.train.load import checked_budget

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "max_experts")
    settings = {name: getattr(FLAGS, name) for name in names} | {"stop": tuple(FLAGS.stop)} | changes
    settings["budget"] = checked_budget(self.loaded.config, settings.get("budget", self.loaded.budget))
    return Request(prompt, stop_token=self.tokenizer.eos_id, **settings)

  def engine(self, slots: int, capacity: int, steps: int):
    from moe_lab.infer.engine import Engine

    return Engine(
      self.loaded.config,
      self.loaded.params,
      self.loaded.router_state,
      slots=slots,
      capacity=capacity,
      steps=steps,
      steady=FLAGS.steady,
      budget=self.loaded.budget,
      decode=self.tokenizer.decode,
    )

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
      "step": self.loaded.step,
    }


def _stream(model: _Model, engine, request):
  """Writes one response to stderr as it comes, and returns it."""
  from moe_lab.infer.responses import Response

  response, in_colour = Response(), sys.stderr.isatty()
  for _, token in engine.generate([request]):
    response.add(token)
    text = _coloured(token.text, token.experts, model.routing) if in_colour and token.text else token.text
    print(text, end="", file=sys.stderr, flush=True)
  print(file=sys.stderr)
  return response


def _legend(model: _Model) -> None:
  if sys.stderr.isatty():
    counts = range(max(model.routing.k_min, 1), model.routing.slots + 1)
    print("experts a token: " + " ".join(_coloured(str(n), n, model.routing) for n in counts), file=sys.stderr)


def _one(model: _Model) -> dict:
  request = model.request(model.tokens(FLAGS.prompt))
  engine = model.engine(1, len(request.prompt) + request.max_tokens, steps=4)
  _legend(model)
  print(FLAGS.prompt, end="", file=sys.stderr, flush=True)
  started = time.monotonic()
  response = _stream(model, engine, request)
  return {
    "text": response.text,
    "experts": response.experts,
    "log_probs": response.log_probs,
    "stopped": response.finish == "stop",
  } | model.result([response], engine, time.monotonic() - started)


def _chat(model: _Model) -> dict:
  """Goes on from all that was said; of a talk longer than the context the oldest part is forgotten."""
  if FLAGS.max_tokens >= FLAGS.context:
    raise UserError(f"--context={FLAGS.context}: wanted more than --max_tokens={FLAGS.max_tokens}")
  engine = model.engine(1, FLAGS.context, steps=4)
  _legend(model)
  said, responses, seconds = model.tokens(FLAGS.prompt), [], 0.0
  for turn in itertools.count():
    try:
      print("> ", end="", file=sys.stderr, flush=True)
      line = sys.stdin.readline()
    except KeyboardInterrupt:
      break
    if not line:
      break
    said += model.tokens(line)[1:]
    request = model.request(said[-(FLAGS.context - FLAGS.max_tokens) :], seed=FLAGS.seed + turn)
    started = time.monotonic()
    responses.append(_stream(model, engine, request))
    seconds += time.monotonic() - started
    said += [*(t for t in responses[-1].tokens if t != model.tokenizer.eos_id), *model.tokens("\n")[1:]]
  return {"text": [r.text for r in responses], "turns": len(responses)} | model.result(
    responses, engine, max(seconds, 1e-9)
  )


def _file(model: _Model, path: Path) -> dict:
  from moe_lab.infer.responses import finished, read_prompts
  from moe_lab.io.files import dump_json

  lines = read_prompts(path)
  requests = [
    model.request(model.tokens(text), **{"seed": FLAGS.seed + index} | changes)
    for index, (text, changes) in enumerate(lines)
  ]
  engine = model.engine(min(FLAGS.slots, len(requests)), max(len(r.prompt) + r.max_tokens for r in requests), steps=8)
  for request in requests:
    engine.check(request)
  out = Path(FLAGS.out or f"{path}.responses.jsonl")
  try:
    file = open(out, "x", encoding="utf-8", errors="replace")  # noqa: SIM115
  except FileExistsError:
    raise UserError(f"--out={out}: it is there already; wanted the name of a new file") from None
  except OSError as error:
    raise UserError(f"--out={out}: {error.strerror}") from None
  responses, started = [], time.monotonic()
  with file:
    for index, response in finished(engine, requests):
      fields = {"index": index, "prompt": lines[index][0]} | dataclasses.asdict(response)
      print(dump_json(fields | {"mean_experts": response.mean_experts}), file=file, flush=True)
      responses.append(response)
      print(f"\r{len(responses)} of {len(requests)}", end="", file=sys.stderr, flush=True)
  print(file=sys.stderr)
  return {"prompts": len(requests), "file": out} | model.result(responses, engine, time.monotonic() - started)


def main(workdir: Path) -> dict:
  """Generates from the newest (or the asked) checkpoint in `workdir`."""
  if bool(FLAGS.prompts) + FLAGS.chat + bool(FLAGS.prompt and FLAGS.prompts) > 1:
    raise UserError("wanted one of --prompt, --prompts and --chat")
  if FLAGS.out and not FLAGS.prompts:
    raise UserError(f"--out={FLAGS.out}: wanted with --prompts only")
  model = _Model(workdir)
  if FLAGS.prompts:
    result = _file(model, Path(FLAGS.prompts))
  else:
    result = _chat(model) if FLAGS.chat else _one(model)
  return result | {"workdir": workdir}


if __name__ == "__main__":
  program.run(main, FLAGS, keep_memory=False)  # decoding takes few blocks of memory
