"""Compiles a program for TPU chips that are not here: does it fit, how long would a step take, what binds?

    python -m experiments.preflight --config=configs/medium_50b.py:8k --topology=v5p:4x4x8
    python -m experiments.preflight --config=configs/medium_50b.py:8k --topology=v5p:4x4x8 --search
    python -m experiments.preflight --config=configs/medium_50b.py --topology=v5p:2x2x4 --program=decode --slots=64 \\
      --context=32768 --config.mesh.fsdp=1 --config.mesh.expert=8 --config.mesh.model=2
    python -m experiments.preflight --config=configs/medium_50b.py --program=offload --memory_gb=24 --budget=2 \\
      --context=8192 --config.adapt.weights=nf4

The program is the training step, or one of the engine's: a step of decoding in all slots, a chunk of prompts. Needs
libtpu, which holds the compiler (the extra `tpu`), and no TPU. With `mesh.slices` larger than 1 the topology is that
of one slice. `offload` compiles nothing and needs no libtpu: it plans which experts stay in one accelerator's memory,
which wait in the host's, and what a decoding token moves. The table goes to stderr, and the result is the last line on
stdout.
"""

import logging
import sys

from absl import flags

from moe_lab.config import program
from moe_lab.config.schema import Config
from moe_lab.errors import UserError

PROGRAMS = ("train", "prefill", "decode", "offload")
WANTED = {  # flags that not all programs have
  "topology": ("train", "prefill", "decode"),
  "search": ("train",),
  "slots": ("prefill", "decode", "offload"),
  "context": ("prefill", "decode", "offload"),
  "chunk": ("prefill", "decode", "offload"),
  "memory_gb": ("offload",),
  "budget": ("offload",),
  "reserve_gb": ("offload",),
}

FLAGS = flags.FlagValues()
flags.DEFINE_string("topology", "v5e:2x2", "Chips, as they are sold: KIND:AxB or KIND:AxBxC.", flag_values=FLAGS)
flags.DEFINE_enum("program", "train", PROGRAMS, "What to compile, or to plan.", flag_values=FLAGS)
flags.DEFINE_bool("search", False, "Rank all meshes that divide the model; compile the best three.", flag_values=FLAGS)
flags.DEFINE_integer(
  "slots", None, "Sequences that are served together; by default 64, offload: 1.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("context", 0, "Positions in the cache of each; 0: data.seq_len.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("chunk", 128, "Tokens of a prompt that are read at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float(
  "memory_gb", 24.0, "offload: memory of the accelerator, in 10^9 bytes.", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_float(
  "budget", None, "offload: mean experts of a token and layer; by default routing.budget.", flag_values=FLAGS
)
flags.DEFINE_float(
  "reserve_gb", 1.0, "offload: of it for activations and the program.", lower_bound=0, flag_values=FLAGS
)

log = logging.getLogger("experiments.preflight")


def main(config: Config) -> dict:
  """Returns what `report.preflight` finds, of the best mesh with `--search`; or `residency.report` of a plan."""
  training = FLAGS.program == "train"
  for name, programs in WANTED.items():
    if FLAGS[name].present and FLAGS.program not in programs:
      raise UserError(f"--{name}: wanted with --program={' or '.join(programs)} only")
  context = FLAGS.context or config.data.seq_len
  if FLAGS.program == "offload":
    return offload(config, context, FLAGS.slots or 1)
  from moe_lab.preflight.report import preflight, table
  from moe_lab.preflight.search import search, suggestion
  from moe_lab.preflight.serving import Serving

  serving = None
  if not training:
    serving = Serving(FLAGS.program, FLAGS.slots or 64, context, FLAGS.chunk)
  if FLAGS.search:
    result = search(config, FLAGS.topology, log.info)
  else:
    result = preflight(config, FLAGS.topology, serving)
    if training:
      result["suggestion"] = suggestion(config, FLAGS.topology)
  print(table(result), file=sys.stderr)
  return result


def offload(config: Config, context: int, sequences: int) -> dict:
  """Returns `residency.report` of a plan for one accelerator."""
  from moe_lab.preflight import residency

  memory, reserve = (round(gb * residency.GB) for gb in (FLAGS.memory_gb, FLAGS.reserve_gb))
  made = residency.plan(
    config, memory, context, sequences=sequences, chunk=FLAGS.chunk, budget=FLAGS.budget, reserve=reserve
  )
  result = residency.report(config, made, context, sequences)
  print(residency.table(result), file=sys.stderr)
  return result


if __name__ == "__main__":
  program.run(main, FLAGS)
