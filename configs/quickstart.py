"""A small model on the Python standard library's source: minutes on a laptop's CPU.

python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from moe_lab.config import base_config


def get_config(arg=None):
  config = base_config()
  config.train.steps = 600
  config.routing.warmup_steps = 150
  return config
