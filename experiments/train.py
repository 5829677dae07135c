"""Trains a model, evaluates it on held-out documents and writes the run's page.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Started again with the same command, it goes on from the last checkpoint. The
result is the last line on stdout. Exit code 75 after SIGTERM: saved, start again.
"""

import sys
from pathlib import Path

from moe_lab.config import program
from moe_lab.config.schema import Config


def main(config: Config, workdir: Path) -> dict:
  """Trains `config` in `workdir` and returns the result."""
  from moe_lab.report.run_page import write_report
  from moe_lab.train.loop import train

  result = train(config, workdir, program.cache_dir(), sys.argv)
  return result | {"report": write_report(workdir)}


if __name__ == "__main__":
  program.run(main)
