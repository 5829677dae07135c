"""A larger system of the same kind: 208 B parameters, at most 31 B of them active, 8,192 tokens.

python -m experiments.preflight --config=configs/large_200b.py --topology=v5p:8x8x8
"""

from configs import medium_50b


def get_config(arg=None):
  if arg:
    raise ValueError(f"configs/large_200b.py takes no argument, and got {arg!r}")
  config = medium_50b.get_config("8k")
  config.model.dim = 6144
  config.model.num_layers = 48
  config.model.num_heads = 48
  config.model.num_experts = 64
  config.model.expert_dim = 3584
  config.mesh.fsdp = 64
  config.mesh.expert = 8  # shared by 16, the buffers for the worst case would not fit
  config.train.batch_size = 512
  config.train.accumulate = 1
  config.train.learning_rate = 2e-4
  return config
