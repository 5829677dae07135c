"""A checkpoint of somebody else's, opened: what it is, and where its tensors are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moe_lab.config.schema import Config
from moe_lab.data.tokenizer import Tokenizer
from moe_lab.errors import UserError
from moe_lab.interop import gguf
from moe_lab.interop.hf import tokenizer as hf_tokenizer
from moe_lab.interop.hf.config import family_of, to_config
from moe_lab.interop.hf.files import Safetensors, read_json
from moe_lab.interop.tensors import Reader, Row

# What describes a checkpoint to people; an export of the same weights takes it along.
DESCRIBED = ("README.md", "LICENSE")


class Checkpoint(NamedTuple):
  """What is known before a tensor is read.

  Attributes:
    family: whose model it is (`hf/families.py`).
    config: ours.
    raw: the config.json that it has, or would have.
    rows: of its format.
    reader: of its tensors.
    needless: names of tensors that may be there, as a regular expression.
    dtype: of the tensors, as numpy calls it.
    tokenizer: None: it has none.
    carried: files to keep with the run, by name: what an export takes along.
  """

  family: str
  config: Config
  raw: Mapping
  rows: tuple[Row, ...]
  reader: Reader
  needless: str
  dtype: str
  tokenizer: Tokenizer | None
  carried: dict[str, bytes]


def open_checkpoint(path: Path) -> Checkpoint:
  """Opens a folder of Hugging Face files, or a .gguf file; raises UserError, a line, for what cannot be imported."""
  if path.suffix == ".gguf":
    return _gguf(path)
  if path.is_file():
    raise UserError(f"{path}: wanted a folder with config.json and safetensors, or a .gguf file")
  raw = read_json(path / "config.json")
  family, config = family_of(raw, str(path / "config.json")), to_config(raw, str(path / "config.json"))
  reader = Safetensors(path)
  names = (*hf_tokenizer.CARRIED, *DESCRIBED)
  carried = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
  tokenizer = hf_tokenizer.of_folder(path, raw, config.data.vocab_size)
  # Old Llama files hold rotary frequencies, which follow from the configuration.
  needless = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
  return Checkpoint(family.name, config, raw, family.rows, reader, needless, reader.dtype, tokenizer, carried)


def _gguf(path: Path) -> Checkpoint:
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  reader = gguf.Gguf(path)
  raw = reader.to_raw()
  config, text = to_config(raw, str(path)), reader.tokenizer_json()
  pieces = reader.get("tokenizer.ggml.tokens")
  ends = {name: raw[f"{name}_token_id"] for name in ("bos", "eos")}
  tokenizer = hf_tokenizer.of_text(text, ends["bos"], ends["eos"], config.data.vocab_size, str(path))
  settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
  settings |= {
    f"{name}_token": pieces[token] for name, token in ends.items() if token is not None and token < len(pieces)
  }
  if template := reader.get("tokenizer.chat_template"):
    settings["chat_template"] = template
  carried = {"tokenizer.json": text.encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
  return Checkpoint("llama", config, raw, gguf.ROWS, reader, gguf.NEEDLESS, reader.dtype, tokenizer, carried)
