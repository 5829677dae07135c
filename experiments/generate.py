"""Writes on from a prompt with the checkpoint of a run.

    python -m experiments.generate --workdir=runs/quickstart --prompt='def main(' --budget=2

The text streams to stderr as it comes, in a terminal coloured by the experts
that each token took; the result is the last line on stdout.
"""

import sys
import time
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("prompt", "", "Text to go on from; empty: the beginning of a document.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 128, "At most so many new tokens.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "Of sampling; 0 takes the most likely token.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float(
  "top_p", 0.95, "Draw from the likeliest tokens that reach this probability.", 0, 1, flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of sampling.", flag_values=FLAGS)
flags.DEFINE_float("budget", None, "Mean experts to ask for; by default the trained budget.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.", flag_values=FLAGS)

# Blue to yellow, few to many experts: ANSI 256 colours of about equal lightness steps.
_COLOURS = (33, 37, 36, 35, 71, 107, 143, 178, 220)


def _coloured(text: str, share: float) -> str:
  colour = _COLOURS[round(min(max(share, 0), 1) * (len(_COLOURS) - 1))]
  return f"\x1b[38;5;{colour}m{text}\x1b[0m"


def main(workdir: Path) -> dict:
  """Generates from the newest (or the asked) checkpoint in `workdir`."""
  import numpy as np

  from moe_lab.data.tokenizer import load_tokenizer
  from moe_lab.infer.generate import Generator
  from moe_lab.train.load import load_model

  loaded = load_model(workdir, FLAGS.step, FLAGS.budget)
  path = workdir / "tokenizer.model"
  if not path.exists():
    raise UserError(
      f"{workdir} has no tokenizer.model: it was trained on a synthetic task, which has no text to generate"
    )
  tokenizer = load_tokenizer(str(path), loaded.config.data.vocab_size)
  loaded.check_fingerprint(tokenizer.fingerprint)
  prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(FLAGS.prompt)]).astype(np.int32)

  routing, colour = loaded.config.routing, sys.stderr.isatty()
  steps, shown, started = [], FLAGS.prompt, time.monotonic()
  print(FLAGS.prompt, end="", file=sys.stderr, flush=True)
  generator = Generator(loaded.config, loaded.params, loaded.router_state)
  for step in generator.generate(
    prompt, FLAGS.max_tokens, temperature=FLAGS.temperature, top_p=FLAGS.top_p, seed=FLAGS.seed,
    budget=loaded.budget, stop=tokenizer.eos_id,
  ):  # fmt: skip
    steps.append(step)
    text = tokenizer.decode(prompt[1:].tolist() + [s.token for s in steps])
    if text.endswith("\ufffd"):
      continue  # the rest of the character is still to come
    new, shown = text[len(shown) :], text
    share = (step.experts - routing.k_min) / max(routing.k_max - routing.k_min, 1)
    print(_coloured(new, share) if colour else new, end="", file=sys.stderr, flush=True)
  print(file=sys.stderr)
  return {
    "text": shown[len(FLAGS.prompt) :],
    "tokens": len(steps),
    "budget": loaded.budget,
    "mean_experts": sum(s.experts for s in steps) / len(steps),
    "experts": [s.experts for s in steps],
    "mean_log_prob": sum(s.log_prob for s in steps) / len(steps),
    "stopped": steps[-1].token == tokenizer.eos_id,
    "tokens_per_second": len(steps) / (time.monotonic() - started),
    "step": loaded.step,
    "workdir": workdir,
  }


if __name__ == "__main__":
  program.run(main, FLAGS)
