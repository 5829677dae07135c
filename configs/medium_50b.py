"""The reference system: 50 B parameters, at most 14 B of them active.

    python -m experiments.preflight --config=configs/medium_50b.py:8k --topology=v5p:4x4x8
    python -m experiments.train --config=configs/medium_50b.py --config.data.sources='jsonl:corpus/*' --workdir=runs/50b

The argument is the context:

  128k  131,072 tokens, eight sequences at a time, each spread over all chips along `fsdp` (the default)
  8k    8,192 tokens, for the bulk of training

A token takes 1 to 8 of a layer's 32 experts, as the policy decides, and three on average: 6.4 B active parameters.
Attention has 32 query heads in 8 KV groups. Seven have slopes and look at 49 to 6,421 keys; one has slope 0 and looks
at everything, and its logits span 2 S = 16, enough to single out one key of 131,072 (ln of that is 11.8).
"""

from moe_lab.config import base_config

CONTEXTS = ("128k", "8k")


def get_config(arg=None):
  context = arg or "128k"
  if context not in CONTEXTS:
    raise ValueError(f"configs/medium_50b.py:{context}: wanted one of {', '.join(CONTEXTS)}")
  config = base_config()
  config.model.dim = 4096
  config.model.num_layers = 32
  config.model.num_heads = 32
  config.model.num_kv_heads = 8
  config.model.head_dim = 128
  config.model.num_experts = 32
  config.model.expert_dim = 3840
  config.model.position = "alibi"
  config.model.num_global_groups = 1
  config.model.qk_norm = True
  config.model.qk_bound = 8.0
  config.model.dtype = "bfloat16"
  config.model.remat = "full"  # a layer's input alone is 1 GiB for 131,072 tokens
  config.routing.method = "dynamic"
  config.routing.k_max = 8
  config.routing.budget = 3.0
  config.routing.budget_mode = "at_most"
  config.routing.warmup_steps = 2000
  config.routing.expert_dropout = 0.05
  config.data.vocab_size = 65_536
  config.mesh.fsdp = 16
  config.mesh.expert = 8
  if context == "128k":
    config.data.seq_len = 131_072
    config.train.batch_size = 16  # 2 M tokens
    config.train.accumulate = 2  # eight at a time, one for each along `expert`; all weights are fetched each time
  else:
    config.data.seq_len = 8192
    config.train.batch_size = 256
    config.train.accumulate = 2  # one sequence a chip
  config.train.steps = 100_000
  config.train.learning_rate = 3e-4
  config.train.warmup_steps = 2000
  config.train.final_lr_share = 0.1
  config.train.eval_every = 1000
  config.train.checkpoint_every = 1000
  return config
