"""Trains a model, evaluates it on held-out documents and writes the run's page.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Started again with the same command, it goes on from the last checkpoint. The
result is the last line on stdout. Exit code 75 after SIGTERM: saved, start again.

On several hosts every process is started with the same line. On a TPU pod, under
Slurm, Open MPI or Kubernetes they find each other; elsewhere the flags below say
how. Process 0 writes.
"""

import sys
from pathlib import Path

from absl import flags

from moe_lab.config import hosts, program
from moe_lab.config.schema import Config

FLAGS = flags.FlagValues()
hosts.define(FLAGS)


def main(config: Config, workdir: Path) -> dict | None:
  """Trains `config` in `workdir` and returns the result; None but in the process that writes."""
  given = hosts.given(FLAGS)
  from moe_lab.io.hosts import is_first, joined
  from moe_lab.report.run_page import write_report
  from moe_lab.train.loop import train

  with joined(given):
    result = train(config, workdir, program.cache_dir(), sys.argv, step_timeout=given.step_timeout)
    return result | {"report": write_report(workdir)} if is_first() else None


if __name__ == "__main__":
  program.run(main, FLAGS)
