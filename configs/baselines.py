"""The systems that ours are compared with, each with its published shapes.

    python -m experiments.preflight --config=configs/baselines.py:mixtral_8x7b --topology=v5p:4x4x4

The argument names one:

  llama3_70b        dense, 70 B (arXiv 2407.21783)
  phi3_medium       dense, 14 B (arXiv 2404.14219)
  switch_base       Switch, 128 experts, k = 1 (arXiv 2101.03961); a decoder whose layers are all mixtures, where the
                    published one has an encoder too and a mixture in every other layer
  mixtral_8x7b      top 2 of 8 (arXiv 2401.04088)
  deepseek_moe_16b  top 6 of 64 fine experts and two shared ones (arXiv 2401.06066)

A dense model is one expert that every token takes.
"""

from moe_lab.config import base_config

# dim, layers, heads, KV heads, head width, experts, expert width, k, vocabulary, context, rotary base
SHAPES = {
  "llama3_70b": (8192, 80, 64, 8, 128, 1, 28_672, 1, 128_256, 8192, 5e5),
  "phi3_medium": (5120, 40, 40, 10, 128, 1, 17_920, 1, 32_064, 4096, 1e4),
  "switch_base": (768, 12, 12, 12, 64, 128, 2048, 1, 32_128, 512, 1e4),
  "mixtral_8x7b": (4096, 32, 32, 8, 128, 8, 14_336, 2, 32_000, 8192, 1e6),
  "deepseek_moe_16b": (2048, 28, 16, 16, 128, 64, 1408, 6, 102_400, 4096, 1e4),
}


def get_config(arg=None):
  if arg not in SHAPES:
    raise ValueError(f"configs/baselines.py:{arg}: wanted one of {', '.join(SHAPES)}")
  config = base_config()
  model, routing = config.model, config.routing
  (
    model.dim, model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim, model.num_experts,
    model.expert_dim, routing.k, config.data.vocab_size, config.data.seq_len, model.rotary_base,
  ) = SHAPES[arg]  # fmt: skip
  model.position = "rotary"
  model.qk_norm = False
  model.dtype = "bfloat16"
  model.remat = "full"
  routing.method = "topk"
  routing.standardise = False
  if model.num_experts == 1:
    routing.load_balance_weight = 0.0
    routing.z_loss_weight = 0.0
  if arg == "deepseek_moe_16b":
    model.num_dense_layers = 1
    model.dense_dim = 10_944
    model.num_shared_experts = 2
    routing.gate = "softmax_all"  # not renormalised over the chosen
  config.train.batch_size = 2**21 // config.data.seq_len  # 2 M tokens
  config.train.learning_rate = 3e-4
  config.train.warmup_steps = 2000
  config.train.steps = 100_000
  return config
