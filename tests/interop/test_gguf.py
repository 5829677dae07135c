"""A small GGUF file, made from a model of transformers as llama.cpp's converter makes one."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

import gguf
import jax.numpy as jnp
import torch

from moe_lab.errors import UserError
from moe_lab.train.convert import import_checkpoint
from moe_lab.train.load import load_model
from tests.interop.checkpoints import VOCAB, peer

NAMES = {
  "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip
# Two control tokens, the letters ! to j, and pairs of the last ones: 96 in all.
LETTERS = [chr(code) for code in range(0x21, 0x6B)]
MERGES = [f"{one} {two}" for one in "abcd" for two in "fghij"]
VOCABULARY = ["<begin>", "<end>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]


def write(path, architecture="llama", pre="smollm", change=lambda writer: None):
  """Writes the case "llama"; returns its model."""
  model = peer("llama")
  config, writer = model.config, gguf.GGUFWriter(path, architecture)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(VOCABULARY)
  writer.add_token_types([3, 3, *[1] * (VOCAB - 2)])
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  change(writer)
  for name, tensor in model.state_dict().items():
    for theirs, short in NAMES.items():
      name = name.replace(theirs, short)
    values = tensor.numpy()
    if "attn_q" in name or "attn_k" in name:
      heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
      values = values.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(values.shape)
    writer.add_tensor(name, np.ascontiguousarray(values))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return model


def test_logits_are_those_of_the_model_it_was_made_from(tmp_path):
  theirs = write(tmp_path / "small.gguf")
  record = import_checkpoint(tmp_path / "small.gguf", tmp_path / "run", ["convert"])
  assert record["family"] == "llama" and record["tensors"] == 3 + 9 * 3
  loaded = load_model(tmp_path / "run")
  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 60))
  out = loaded.model.apply(
    {"params": loaded.params}, jnp.asarray(tokens), jnp.ones_like(tokens), jnp.ones(1), loaded.router_state
  )
  with torch.no_grad():
    np.testing.assert_allclose(out.logits_BLV, theirs(torch.tensor(tokens)).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "settings, words",
  [
    (dict(architecture="lama"), "architecture 'lama': wanted llama .did you mean 'llama'"),
    (dict(pre="deepseek"), "tokenizer 'gpt2', 'deepseek': wanted gpt2"),
    (dict(change=lambda writer: writer.add_expert_count(8)), "8 experts: wanted a dense model"),
    (
      dict(change=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)),
      "rotary scaling 'yarn': wanted none",
    ),
  ],
)
def test_what_cannot_be_read_is_a_line(tmp_path, settings, words):
  write(tmp_path / "small.gguf", **settings)
  with pytest.raises(UserError, match=words):
    import_checkpoint(tmp_path / "small.gguf", tmp_path / "run", ["convert"])


def test_a_file_that_is_none(tmp_path):
  (tmp_path / "junk.gguf").write_bytes(b"junk" * 10)
  with pytest.raises(UserError, match="junk.gguf cannot be read as GGUF"):
    import_checkpoint(tmp_path / "junk.gguf", tmp_path / "run", ["convert"])
  assert not (tmp_path / "run").exists()
