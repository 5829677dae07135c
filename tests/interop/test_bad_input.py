"""What cannot be converted is a line that says so, and nothing is written."""

import json

import numpy as np
import pytest

pytest.importorskip("safetensors")

import safetensors.numpy
from flax.traverse_util import flatten_dict

from experiments import convert as program
from moe_lab.errors import UserError
from moe_lab.interop.hf.config import to_config
from moe_lab.interop.hf.families import FAMILIES
from moe_lab.interop.tensors import places
from moe_lab.train.convert import import_checkpoint
from moe_lab.train.state import abstract_state

RAW = dict(
  model_type="llama", vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
  num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=64, rope_theta=10_000, hidden_act="silu",
  eos_token_id=2, bos_token_id=1,
)  # fmt: skip
MOE = RAW | dict(
  model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6,
  shared_expert_intermediate_size=10,
)  # fmt: skip


def tensors_of(raw):
  shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_state(to_config(raw, "")).params, sep="/").items()}
  return {place.name: np.zeros(place.shape, np.float32) for place in places(FAMILIES[raw["model_type"]].rows, shapes)}


@pytest.fixture
def folder(tmp_path):
  """A checkpoint in two shards."""
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(RAW))
  found = tensors_of(RAW)
  names = sorted(found)
  index = {}
  for number, part in enumerate((names[:5], names[5:]), 1):
    file = f"model-0000{number}-of-00002.safetensors"
    safetensors.numpy.save_file({name: found[name] for name in part}, folder / file)
    index |= dict.fromkeys(part, file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  return folder


def rewritten(folder, change):
  """Writes the second shard again, changed."""
  path = folder / "model-00002-of-00002.safetensors"
  found = safetensors.numpy.load_file(path)
  change(found)
  safetensors.numpy.save_file(found, path)


def refused(folder, words):
  with pytest.raises(UserError, match=words):
    import_checkpoint(folder, folder.parent / "run", ["convert"])
  assert not (folder.parent / "run").exists()


def test_shards(folder):
  (folder / "model-00001-of-00002.safetensors").unlink()
  refused(folder, "model-00001-of-00002.safetensors: no such shard, but model.safetensors.index.json lists it")
  (folder / "model-00001-of-00002.safetensors").write_bytes(b"junk")
  refused(folder, "model-00001-of-00002.safetensors cannot be read as safetensors")
  (folder / "model.safetensors.index.json").unlink()
  refused(folder, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda t: t.update({"model.norm.weight": np.zeros(9, np.float32)}), r"model.norm.weight is \[9\]: wanted \[8\]"),
    (lambda t: t.update(extra=np.zeros(1, np.float32)), "has a tensor extra, for which the model has no place"),
    (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight, but model.safetensors.index.json says so"),
    (lambda t: t.update({"model.norm.weight": np.zeros(8, np.int8)}), "model.norm.weight is of type I8: wanted one of"),
  ],
)
def test_tensors(folder, change, words):
  rewritten(folder, change)
  refused(folder, words)


def test_a_pickle_is_refused(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(RAW))
  (folder / "pytorch_model.bin").write_bytes(b"")
  refused(folder, "pytorch_model.bin is a pickle, which may run code when it is loaded: wanted safetensors")


@pytest.mark.parametrize(
  "raw, words",
  [
    (RAW | {"model_type": "lama"}, "model_type 'lama': wanted one of .*did you mean 'llama'"),
    (RAW | {"model_type": None}, "model_type None: wanted one of"),
    (RAW | {"hidden_size": None}, "no hidden_size, which the model needs"),
    (RAW | {"hidden_size": "8"}, "hidden_size = '8': wanted a positive integer"),
    (MOE | {"num_hidden_layers": 0}, "num_hidden_layers = 0: wanted a positive integer"),
    (RAW | {"rms_norm_eps": "small"}, "model.norm_epsilon = 'small': wanted a finite number"),
    (RAW | {"hidden_act": "gelu"}, "hidden_act = 'gelu': wanted 'silu'"),
    (RAW | {"attention_bias": True}, "attention_bias = True: wanted False"),
    (RAW | {"sliding_window": 16}, "sliding_window = 16: wanted none, or max_position_embeddings = 64 no larger"),
    (RAW | {"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window = 4096: wanted none"),
    (RAW | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': wanted default, linear or llama3"),
    (RAW | {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_type 'llama3' has no low_freq_factor"),
    (RAW | {"quantization_config": {"bits": 4}}, "quantization_config = "),
    (MOE | {"decoder_sparse_step": 2, "num_hidden_layers": 3}, "wanted dense layers at the bottom only"),
    (MOE | {"mlp_only_layers": [0, 1]}, "wanted at least one layer with experts"),
    (MOE | {"num_experts_per_tok": 5}, "routing.k = 5: wanted at most model.num_experts = 4"),
  ],
)
def test_a_configuration_that_the_model_code_does_not_know(raw, words):
  with pytest.raises(UserError, match=words):
    to_config(raw, "config.json")


def test_a_tokenizer_that_does_not_fit(folder):
  tokenizers = pytest.importorskip("tokenizers")
  for size, words in ((41, "it does not fit a model with 40"), (30, "it does not fit a model with 40")):
    model = tokenizers.models.BPE({chr(97 + i): i for i in range(size)}, [])
    (folder / "tokenizer.json").write_text(tokenizers.Tokenizer(model).to_str())
    refused(folder, words)
  (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
  refused(folder, "it has no token '<end>'")
  (folder / "tokenizer.json").write_text("{}")
  refused(folder, "tokenizer.json cannot be used as a tokenizer")


def test_a_folder_that_is_taken(folder):
  (folder.parent / "run").mkdir()
  (folder.parent / "run" / "mine").write_text("")
  with pytest.raises(UserError, match="--to=.*run: it is there already"):
    import_checkpoint(folder, folder.parent / "run", ["convert"])


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--from: wanted a path"),
    (["--from=nowhere", "--to=run"], "--from=nowhere: no such file or folder"),
    (["--from={folder}"], "--to: wanted a path"),
    (["--from={folder}", "--to=run", "--family=llama"], "--family=llama: wanted only with --from=RUN"),
    (["--from={folder}/config.json", "--to=run"], "wanted a folder with config.json and safetensors, or a .gguf file"),
    (["--from={folder}/..", "--to=run"], "config.json cannot be read"),
  ],
)
def test_the_command_line(folder, arguments, words):
  for name in program.FLAGS:
    program.FLAGS[name].unparse()
  program.FLAGS(["convert", *(argument.format(folder=folder) for argument in arguments)])
  with pytest.raises(UserError, match=words):
    program.main()
