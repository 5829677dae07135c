"""Reads a GGUF file of the llama architecture, dense: tensors, configuration, and the tokenizer in its metadata.

Quantised tensors become float32 by the `gguf` package's own rules.
"""

import json
from pathlib import Path

import numpy as np

from moe_lab.errors import UserError, did_you_mean
from moe_lab.interop.extra import need
from moe_lab.interop.tensors import Row

_ARCHITECTURES = ("llama",)
_BLOCK = "blk.{z}"
# llama.cpp turns neighbouring rows of a head's queries and keys, not halves as in `ops/rotary.py`: its converter
# interleaves the halves, and so they are taken apart again.
ROWS = (
  Row("token_embd.weight", "embedding_VD", "V D -> V D"),
  Row("output_norm.weight", "final_norm/gain_D", "D -> D"),
  Row("output.weight", "head_VD", "V D -> V D"),
  Row(f"{_BLOCK}.attn_norm.weight", "layers/attention_norm/gain_D", "D -> D"),
  Row(f"{_BLOCK}.ffn_norm.weight", "layers/mlp_norm/gain_D", "D -> D"),
  Row(f"{_BLOCK}.attn_q.weight", "layers/attention/query_DNH", "(N half two) D -> D N (two half)"),
  Row(f"{_BLOCK}.attn_k.weight", "layers/attention/key_DMH", "(M half two) D -> D M (two half)"),
  Row(f"{_BLOCK}.attn_v.weight", "layers/attention/value_DMH", "(M H) D -> D M H"),
  Row(f"{_BLOCK}.attn_output.weight", "layers/attention/out_NHD", "D (N H) -> N H D"),
  Row(f"{_BLOCK}.ffn_gate.weight", "layers/mlp/gate_DF", "F D -> D F"),
  Row(f"{_BLOCK}.ffn_up.weight", "layers/mlp/up_DF", "F D -> D F"),
  Row(f"{_BLOCK}.ffn_down.weight", "layers/mlp/down_FD", "D F -> F D"),
)
NEEDLESS = r"rope_freqs\.weight"  # refused by `to_raw` where it says something
_KEYS = {  # key of config.json -> of the metadata
  "hidden_size": "embedding_length",
  "num_hidden_layers": "block_count",
  "num_attention_heads": "attention.head_count",
  "num_key_value_heads": "attention.head_count_kv",
  "intermediate_size": "feed_forward_length",
  "rms_norm_eps": "attention.layer_norm_rms_epsilon",
  "max_position_embeddings": "context_length",
}
_SPLITS = {  # how a text is cut before byte pairs are merged, by the name that llama.cpp has for it
  "gpt-2": (),
  "default": (),
  "smollm": ({"type": "Digits", "individual_digits": True},),
}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens


class Gguf:
  """The tensors of a GGUF file: a `tensors.Reader`.

  Attributes:
    where: the file.
    names: as they lie in it.
    dtype: of what is read.
  """

  dtype = "float32"

  def __init__(self, path: Path):
    """Reads the metadata; raises UserError if it is no GGUF file."""
    self.where, self._gguf = str(path), need("gguf")
    try:
      self._reader = self._gguf.GGUFReader(path)
    except Exception as error:  # a damaged file shows up as nearly any type
      raise UserError(f"{path} cannot be read as GGUF: {error}") from None
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    self.names = tuple(self._tensors)
    self.files = [path]

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(self._tensors[name].shape))  # the fastest axis comes first there

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    try:
      return self._gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
    except (ValueError, NotImplementedError, KeyError, IndexError) as error:
      raise UserError(f"{self.where}: {name} cannot be read: {error}") from None

  def get(self, key: str, default=None):
    """Returns a value of the metadata; raises UserError where it is cut short."""
    field = self._reader.get_field(key)
    try:
      return default if field is None else field.contents()
    except (ValueError, IndexError, TypeError, KeyError) as error:
      raise UserError(f"{self.where}: {key} cannot be read: {error}") from None

  def _number(self, key: str, kind: type, default: float | None = None) -> float:
    """Returns a positive number of the metadata; raises UserError where it is none."""
    value = self.get(key, default)
    if value is None:
      raise UserError(f"{self.where}: no {key} in the metadata")
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
      raise UserError(f"{self.where}: {key} = {value!r}: wanted a positive {'integer' if kind is int else 'number'}")
    return value

  def _texts(self, key: str) -> list[str]:
    values = self.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
      raise UserError(f"{self.where}: {key}: wanted a list of texts")
    return values

  def to_raw(self) -> dict:
    """Returns the config.json that the metadata stands for.

    Raises:
      UserError: another architecture, experts, stretched rotary frequencies, or a key that is missing.
    """
    kind = self.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
      hint = did_you_mean(kind, _ARCHITECTURES)
      raise UserError(f"{self.where}: architecture {kind!r}: wanted {', '.join(_ARCHITECTURES)}{hint}")
    if self.get(f"{kind}.expert_count"):
      raise UserError(f"{self.where}: {self.get(f'{kind}.expert_count')} experts: wanted a dense model")
    scaling = self.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in self._tensors:
      raise UserError(f"{self.where}: rotary scaling {scaling!r}: wanted none; its safetensors can be imported")
    raw = {"model_type": "llama", "rope_theta": self._number(f"{kind}.rope.freq_base", float, 10_000.0)}
    for key, name in _KEYS.items():
      raw[key] = self._number(f"{kind}.{name}", float if key == "rms_norm_eps" else int)
    head_dim = max(raw["hidden_size"] // raw["num_attention_heads"], 1)
    raw["head_dim"] = self._number(f"{kind}.attention.key_length", int, head_dim)
    rotated = self._number(f"{kind}.rope.dimension_count", int, raw["head_dim"])
    raw["partial_rotary_factor"] = rotated / raw["head_dim"]
    raw["tie_word_embeddings"] = "output.weight" not in self._tensors
    if "token_embd.weight" not in self._tensors:
      raise UserError(f"{self.where}: no tensor token_embd.weight")
    raw["vocab_size"] = (*self.shape("token_embd.weight"), 0)[0]
    for name in ("bos", "eos"):
      key = f"tokenizer.ggml.{name}_token_id"
      raw[f"{name}_token_id"] = token = self.get(key)
      if token is not None and not (isinstance(token, int) and 0 <= token < raw["vocab_size"]):
        raise UserError(f"{self.where}: {key} = {token!r}: wanted one of {raw['vocab_size']} ids")
    return raw

  def tokenizer_json(self) -> str:
    """Returns the tokenizer of the metadata as a tokenizer.json.

    Raises:
      UserError: it is not byte-level BPE, or cuts texts in a way that is not known here.
    """
    kind, split = self.get("tokenizer.ggml.model"), self.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(split, str) or split not in _SPLITS:
      raise UserError(
        f"{self.where}: tokenizer {kind!r}, {split!r}: wanted gpt2 (byte-level BPE) with one of {', '.join(_SPLITS)}"
      )
    pieces, merges = self._texts("tokenizer.ggml.tokens"), self._texts("tokenizer.ggml.merges")
    kinds = self.get("tokenizer.ggml.token_type") or [1] * len(pieces)
    if not isinstance(kinds, list) or len(kinds) != len(pieces):
      raise UserError(f"{self.where}: tokenizer.ggml.token_type: wanted a kind for each of {len(pieces)} tokens")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
      {"id": token, "content": piece, "special": kinds[token] == _CONTROL} | plain
      for token, piece in enumerate(pieces)
      if kinds[token] in (_CONTROL, _USER_DEFINED)
    ]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
      "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
      "vocab": {piece: token for token, piece in enumerate(pieces)},
      "merges": [merge.split(" ") for merge in merges],
    }  # fmt: skip
    content = {
      "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
      "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_SPLITS[split], by_bytes]},
      "post_processor": None, "decoder": by_bytes, "model": model,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)
