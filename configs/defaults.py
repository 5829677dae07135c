"""Every field at its default: what a command line that says everything itself begins with.

python -m experiments.train --config=configs/defaults.py --config.train.steps=50 --workdir=runs/defaults
"""

from moe_lab.config import base_config


def get_config(arg=None):
  return base_config()
