"""Compiles a training step for TPU chips that are not here: does it fit, how long would a step take, what binds?

    python -m experiments.preflight --config=configs/medium_50b.py --config.mesh.fsdp=8 --topology=v5p:4x4x8

Needs libtpu, which holds the compiler (the extra `tpu`), and no TPU. The table goes to stderr, and the result is the
last line on stdout.
"""

import sys

from absl import flags

from moe_lab.config import program
from moe_lab.config.schema import Config

FLAGS = flags.FlagValues()
flags.DEFINE_string("topology", "v5e:2x2", "Chips, as they are sold: KIND:AxB or KIND:AxBxC.", flag_values=FLAGS)


def main(config: Config) -> dict:
  """Returns what `moe_lab.preflight.report.preflight` finds."""
  from moe_lab.preflight.report import preflight, table

  result = preflight(config, FLAGS.topology)
  print(table(result), file=sys.stderr)
  return result


if __name__ == "__main__":
  program.run(main, FLAGS)
