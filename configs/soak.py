"""A small model on the standard library's source that hours of faults are to leave unchanged (experiments/soak).

python -m experiments.train --config=configs/soak.py --workdir=runs/small
"""

from moe_lab.config import base_config


def get_config(arg=None):
  config = base_config()
  config.model.dim = 64
  config.model.num_layers = 2
  config.model.expert_dim = 64
  config.routing.warmup_steps = 150
  # A stopped run logs the steps since its last record: only where each step has its own are records alike.
  config.train.log_every = 1
  config.train.eval_every = 100
  config.train.eval_batches = 2
  config.train.checkpoint_every = 50
  return config
