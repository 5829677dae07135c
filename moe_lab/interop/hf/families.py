"""The families of Hugging Face checkpoints that are read and written: one table of tensors each.

A weight there is [outputs, inputs], with heads side by side, head n of a group of G query heads at n = m * G + g as
here; rotary halves lie as in `ops/rotary.py`. So all rules are transposes and splits, and the way back is exact.
"""

import dataclasses

from moe_lab.interop.tensors import Row

_LAYER = "model.layers.{z}"

_TRUNK = (
  Row("model.embed_tokens.weight", "embedding_VD", "V D -> V D"),
  Row("model.norm.weight", "final_norm/gain_D", "D -> D"),
  Row("lm_head.weight", "head_VD", "V D -> V D"),
  Row(f"{_LAYER}.input_layernorm.weight", "layers/attention_norm/gain_D", "D -> D"),
  Row(f"{_LAYER}.post_attention_layernorm.weight", "layers/mlp_norm/gain_D", "D -> D"),
  Row(f"{_LAYER}.self_attn.q_proj.weight", "layers/attention/query_DNH", "(N H) D -> D N H"),
  Row(f"{_LAYER}.self_attn.k_proj.weight", "layers/attention/key_DMH", "(M H) D -> D M H"),
  Row(f"{_LAYER}.self_attn.v_proj.weight", "layers/attention/value_DMH", "(M H) D -> D M H"),
  Row(f"{_LAYER}.self_attn.o_proj.weight", "layers/attention/out_NHD", "D (N H) -> N H D"),
)
_BIASES = (
  Row(f"{_LAYER}.self_attn.q_proj.bias", "layers/attention/query_bias_NH", "(N H) -> N H"),
  Row(f"{_LAYER}.self_attn.k_proj.bias", "layers/attention/key_bias_MH", "(M H) -> M H"),
  Row(f"{_LAYER}.self_attn.v_proj.bias", "layers/attention/value_bias_MH", "(M H) -> M H"),
)
_NORM_OF_HEADS = (
  Row(f"{_LAYER}.self_attn.q_norm.weight", "layers/attention/query_norm/gain_H", "H -> H"),
  Row(f"{_LAYER}.self_attn.k_norm.weight", "layers/attention/key_norm/gain_H", "H -> H"),
)
_NORM_OF_ALL_HEADS = (
  Row(f"{_LAYER}.self_attn.q_norm.weight", "layers/attention/query_norm/gain_NH", "(N H) -> N H"),
  Row(f"{_LAYER}.self_attn.k_norm.weight", "layers/attention/key_norm/gain_MH", "(M H) -> M H"),
)


def _mlp(block: str, path: str) -> tuple[Row, ...]:
  return (
    Row(f"{_LAYER}.{block}.gate_proj.weight", f"layers/{path}/gate_DF", "F D -> D F"),
    Row(f"{_LAYER}.{block}.up_proj.weight", f"layers/{path}/up_DF", "F D -> D F"),
    Row(f"{_LAYER}.{block}.down_proj.weight", f"layers/{path}/down_FD", "D F -> F D"),
  )


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
  one = f"{_LAYER}.{block}.experts.{{e}}"
  return (
    Row(f"{_LAYER}.{block}.gate.weight", "layers/moe/router_DE", "E D -> D E"),
    Row(f"{one}.{gate}.weight", "layers/moe/gate_EDF", "F D -> D F"),
    Row(f"{one}.{up}.weight", "layers/moe/up_EDF", "F D -> D F"),
    Row(f"{one}.{down}.weight", "layers/moe/down_EFD", "D F -> F D"),
  )


@dataclasses.dataclass(frozen=True)
class Family:
  """What a kind of checkpoint is called, and how.

  Attributes:
    name: `model_type` in its config.json.
    architecture: its class in transformers.
    rows: of its tensors.
    fields: key of config.json -> our field; only what differs from family to family.
    always: our fields that such a model always has so.
    default: values of keys that config.json may leave out.
  """

  name: str
  architecture: str
  rows: tuple[Row, ...]
  fields: dict[str, str]
  always: dict[str, object]
  default: dict[str, object]


_DENSE = {"intermediate_size": "model.dense_dim"}
_SPARSE = {"num_experts": "model.num_experts", "num_experts_per_tok": "routing.k"}
_QWEN = _SPARSE | _DENSE | {"moe_intermediate_size": "model.expert_dim"}
_MLP = _mlp("mlp", "mlp")
_SHARED = (
  *_mlp("mlp.shared_expert", "moe/shared"),
  Row(f"{_LAYER}.mlp.shared_expert_gate.weight", "layers/moe/shared_gate_D", "1 D -> D"),
)
_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_NO_NORM = {"model.qk_norm": False}
_FREE_NORM = {"model.qk_norm": True, "model.qk_bound": 0.0}  # the gains are as they come

FAMILIES = {
  family.name: family
  for family in (
    Family("llama", "LlamaForCausalLM", _TRUNK + _MLP, _DENSE, _NO_NORM, {}),
    Family("mistral", "MistralForCausalLM", _TRUNK + _MLP, _DENSE, _NO_NORM, {"sliding_window": 4096}),
    Family(
      "mixtral",
      "MixtralForCausalLM",
      _TRUNK + _experts("block_sparse_moe", "w1", "w3", "w2"),
      {
        "num_local_experts": "model.num_experts",
        "num_experts_per_tok": "routing.k",
        "intermediate_size": "model.expert_dim",
      },  # fmt: skip
      _NO_NORM | {"routing.gate": "softmax_chosen"},
      {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    ),
    Family(
      "olmoe",
      "OlmoeForCausalLM",
      _TRUNK + _NORM_OF_ALL_HEADS + _EXPERTS,
      _SPARSE | {"intermediate_size": "model.expert_dim"},
      _FREE_NORM | {"model.qk_norm_over": "all"},
      {"rms_norm_eps": 1e-5, "norm_topk_prob": False},
    ),
    Family(
      "qwen2_moe",
      "Qwen2MoeForCausalLM",
      _TRUNK + _BIASES + _MLP + _EXPERTS + _SHARED,
      _QWEN | {"shared_expert_intermediate_size": "model.shared_dim", "qkv_bias": "model.qkv_bias"},
      _NO_NORM | {"model.shared_gate": True},
      {"norm_topk_prob": False, "qkv_bias": True},
    ),
    Family(
      "qwen3_moe",
      "Qwen3MoeForCausalLM",
      _TRUNK + _NORM_OF_HEADS + _MLP + _EXPERTS,
      _QWEN,
      _FREE_NORM,
      {"norm_topk_prob": False},
    ),
  )
}
