"""The base model of the routing study: one run of it by hand.

    python -m experiments.train --config=configs/routing_study.py:cpu --config.routing.k_max=4 --workdir=runs/one

The argument is the size:

  cpu    a minute and a half a run on one core; small steps, since a token gains by a third expert only late in training
  gpu    for one GPU
  smoke  seconds; says nothing about methods
"""

from moe_lab.config import base_config

SIZES = ("cpu", "gpu", "smoke")


def get_config(arg=None):
  size = arg or "cpu"
  if size not in SIZES:
    raise ValueError(f"configs/routing_study.py:{size}: wanted one of {', '.join(SIZES)}")
  config = base_config()
  if size == "gpu":
    config.model.dim = 512
    config.model.num_layers = 12
    config.model.num_heads = 8
    config.model.num_kv_heads = 4
    config.model.head_dim = 64
    config.model.num_experts = 32
    config.model.expert_dim = 256
    config.model.dtype = "bfloat16"
    config.data.vocab_size = 8192
    config.data.seq_len = 1024
    config.train.steps = 4000
    config.train.batch_size = 32
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 200
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.routing.warmup_steps = 500
    return config
  config.model.dim = 64
  config.model.num_layers = 3
  config.model.head_dim = 16
  config.model.num_experts = 16
  config.model.expert_dim = 128
  config.data.vocab_size = 1024
  config.train.steps = 3000
  config.train.batch_size = 4
  config.train.learning_rate = 4e-3
  config.train.log_every = 50
  config.train.eval_every = 200
  config.train.checkpoint_every = 600
  config.routing.warmup_steps = 100
  if size == "smoke":
    config.model.dim = 32
    config.model.num_layers = 2
    config.model.head_dim = 8
    config.model.expert_dim = 8
    config.data.seq_len = 64
    config.train.steps = 40
    config.train.log_every = 10
    config.train.eval_every = 20
    config.train.eval_batches = 2
    config.train.checkpoint_every = 20
    config.routing.warmup_steps = 10
  return config
