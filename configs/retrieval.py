"""Facts over long contexts: a small model with the 50B preset's heads, trained at 1K tokens, asked at up to 16K.

    python -m experiments.train --config=configs/retrieval.py:modified --workdir=runs/retrieval/modified

The argument says how the model knows positions:

  modified  a slope for each KV group, one group of eight without (the default)
  plain     ALiBi: every group has its slope
  rotary    rotary embeddings
"""

from configs import medium_50b
from moe_lab.config import base_config
from moe_lab.data import retrieval

ARMS = ("modified", "plain", "rotary")


def get_config(arg=None):
  arm = arg or "modified"
  if arm not in ARMS:
    raise ValueError(f"configs/retrieval.py:{arm}: wanted one of {', '.join(ARMS)}")
  config = base_config()
  # Head size, KV groups and so slopes, global groups and bound are the preset's; layers, as few as the task wants. Of
  # one query head a group, a seed of three finds no use for the group without a slope (experiments/retrieval/LOG.md).
  preset = medium_50b.get_config().model
  config.model.head_dim = preset.head_dim
  config.model.num_kv_heads = preset.num_kv_heads
  config.model.num_heads = 2 * preset.num_kv_heads
  config.model.qk_bound = preset.qk_bound
  config.model.num_global_groups = preset.num_global_groups
  config.model.dim = 128
  config.model.num_layers = 2
  config.model.num_experts = 8
  config.model.expert_dim = 64
  config.model.dispatch = "dense"  # so small that sorting the tokens costs more
  config.routing.method = "topk"
  config.routing.k = 2
  config.data.sources = ("synthetic:retrieval",)
  config.data.vocab_size = retrieval.VOCAB_SIZE
  config.data.seq_len = 1024
  config.train.steps = 1500
  config.train.batch_size = 4
  config.train.learning_rate = 4e-3
  config.train.eval_every = 500
  config.train.checkpoint_every = 500
  if arm == "plain":
    config.model.num_global_groups = 0
  if arm == "rotary":
    config.model.position = "rotary"
    config.model.num_global_groups = 0
    config.train.learning_rate = 2e-3  # at that of the others it does not learn it at all
  return config
