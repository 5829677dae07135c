"""Compiles a program for TPU chips that are not here: does it fit, how long would a step take, what binds?

    python -m experiments.preflight --config=configs/medium_50b.py:8k --topology=v5p:4x4x8
    python -m experiments.preflight --config=configs/medium_50b.py:8k --topology=v5p:4x4x8 --search
    python -m experiments.preflight --config=configs/medium_50b.py --topology=v5p:2x2x4 --program=decode --slots=64 \\
      --context=32768 --config.mesh.fsdp=1 --config.mesh.expert=8 --config.mesh.model=2

The program is the training step, or one of the engine's: a step of decoding in all slots, a chunk of prompts. Needs
libtpu, which holds the compiler (the extra `tpu`), and no TPU. With `mesh.slices` larger than 1 the topology is that
of one slice. The table goes to stderr, and the result is the last line on stdout.
"""

import logging
import sys

from absl import flags

from moe_lab.config import program
from moe_lab.config.schema import Config
from moe_lab.errors import UserError

PROGRAMS = ("train", "prefill", "decode")

FLAGS = flags.FlagValues()
flags.DEFINE_string("topology", "v5e:2x2", "Chips, as they are sold: KIND:AxB or KIND:AxBxC.", flag_values=FLAGS)
flags.DEFINE_enum("program", "train", PROGRAMS, "What to compile.", flag_values=FLAGS)
flags.DEFINE_bool("search", False, "Rank all meshes that divide the model; compile the best three.", flag_values=FLAGS)
flags.DEFINE_integer("slots", 64, "Sequences that are served together.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("context", 0, "Positions in the cache of each; 0: data.seq_len.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("chunk", 128, "Tokens of a prompt that are read at a time.", lower_bound=1, flag_values=FLAGS)

log = logging.getLogger("experiments.preflight")


def main(config: Config) -> dict:
  """Returns what `moe_lab.preflight.report.preflight` finds, of the best mesh with `--search`."""
  training = FLAGS.program == "train"
  for name in ("slots", "context", "chunk") if training else ("search",):
    if FLAGS[name].present:
      raise UserError(f"--{name}: wanted with --program={'prefill or decode' if training else 'train'} only")
  from moe_lab.preflight.report import preflight, table
  from moe_lab.preflight.search import search, suggestion
  from moe_lab.preflight.serving import Serving

  serving = None
  if not training:
    serving = Serving(FLAGS.program, FLAGS.slots, FLAGS.context or config.data.seq_len, FLAGS.chunk)
  if FLAGS.search:
    result = search(config, FLAGS.topology, log.info)
  else:
    result = preflight(config, FLAGS.topology, serving)
    if training:
      result["suggestion"] = suggestion(config, FLAGS.topology)
  print(table(result), file=sys.stderr)
  return result


if __name__ == "__main__":
  program.run(main, FLAGS)
