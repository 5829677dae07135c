"""Small checkpoints of each family, with random weights, as transformers writes them."""

import functools
from pathlib import Path

VOCAB = 96
_SIZES = dict(
  vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
  max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
_LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}  # fmt: skip
_EXPERTS = dict(num_experts=5, num_experts_per_tok=2)
CASES = {  # name -> its class in transformers and what its configuration adds
  "llama": ("Llama", dict(intermediate_size=48, rms_norm_eps=1e-5)),
  "llama3_tied": ("Llama", dict(intermediate_size=48, rope_parameters=_LLAMA3, tie_word_embeddings=True)),
  "llama_linear": (
    "Llama",
    dict(intermediate_size=48, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
  ),
  "mistral": ("Mistral", dict(intermediate_size=48, head_dim=16, sliding_window=None)),
  "mixtral": ("Mixtral", dict(intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)),
  "olmoe": ("Olmoe", dict(intermediate_size=24, **_EXPERTS)),
  "qwen2_moe": (
    "Qwen2Moe",
    dict(
      intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=40, mlp_only_layers=[0],
      **_EXPERTS,
    ),
  ),
  "qwen3_moe": (
    "Qwen3Moe",
    dict(intermediate_size=48, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True, **_EXPERTS),
  ),
}  # fmt: skip


@functools.cache
def peer(case: str):
  """Returns transformers' model of a case; weights large enough that tokens differ in their logits."""
  import torch
  import transformers

  name, changes = CASES[case]
  config = getattr(transformers, f"{name}Config")(**_SIZES | changes)
  torch.manual_seed(0)
  model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:  # gains and biases
        parameter.add_(0.3 * torch.randn_like(parameter))
      else:
        parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
  model.generation_config.eos_token_id = None
  return model


def save(case: str, folder: Path, **options) -> Path:
  """Writes a case's checkpoint; `options` are those of `save_pretrained`."""
  peer(case).save_pretrained(folder, **options)
  return folder
