"""An imported model is a base like any other: in 4 bits, with adapters, and out again, what was made of it."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

import tokenizers
import torch
import transformers

from experiments import adapt as program
from moe_lab.adapt.tensors import part_of, tensors
from moe_lab.config import command_line
from moe_lab.errors import UserError
from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from moe_lab.train.convert import export_run, import_checkpoint
from moe_lab.train.load import load_model
from tests.interop.checkpoints import VOCAB, peer, save

# Dense, with tied embeddings and stretched rotary positions; with biases, a gate and a width of what every token takes,
# and a dense layer; with QK-norm over all heads.
CASES = ("llama3_tied", "qwen2_moe", "olmoe")
DENSE, MIXED, NORMED = (pytest.param(case, marks=pytest.mark.slow) for case in CASES)
command_line.define(program.FLAGS, {"config", "workdir"})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A folder of texts in the 94 printable characters and the space."""
  folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
  for index in range(40):
    (folder / f"{index}.txt").write_bytes(rng.integers(32, 127, 200).astype(np.uint8).tobytes())
  return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """Returns a function from a case to the run that its checkpoint and a tokenizer of characters were imported to."""

  @functools.cache
  def of(case):
    folder = tmp_path_factory.mktemp(case)
    save(case, folder / "theirs")
    pieces = [chr(letter) for letter in range(32, 127)] + ["<end>"]
    assert len(pieces) == VOCAB
    model = tokenizers.models.BPE({piece: number for number, piece in enumerate(pieces)}, [])
    (folder / "theirs" / "tokenizer.json").write_text(tokenizers.Tokenizer(model).to_str())
    (folder / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    import_checkpoint(folder / "theirs", folder / "run", ["convert"])
    return folder / "run"

  return of


def adapt(mode, base, workdir, *arguments):
  for name in program.FLAGS:
    program.FLAGS[name].unparse()
  argv = ["adapt", f"--mode={mode}", f"--base={base}", f"--workdir={workdir}", *arguments]
  return program.main(**command_line.parse(argv, program.FLAGS, {"workdir"}))


def data(text):
  return f"--config.data.sources=text:{text}", "--config.data.seq_len=32", "--config.train.batch_size=4"


def ours(run):
  """Returns the logits of a run, and how far they are from transformers' of what it is exported to."""
  loaded = load_model(run)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
  out = loaded.model.apply(
    {"params": loaded.params}, jnp.asarray(tokens), jnp.ones_like(tokens), jnp.full(2, loaded.budget),
    loaded.router_state,
  )  # fmt: skip
  made = export_run(run, run.parent / f"{run.name}_out", family=None, dtype=None, step=None)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(run.parent / f"{run.name}_out")
  with torch.no_grad():
    logits = theirs(torch.tensor(tokens)).logits.numpy()
  return np.asarray(out.logits_BLV), logits, made


@pytest.mark.parametrize("case", [CASES[0], MIXED, NORMED])
def test_in_4_bits_and_out_again(case, imported, text, tmp_path):
  made = adapt("quantise", imported(case), tmp_path / "coded", *data(text), "--config.adapt.weights=int4")
  config = load_model(tmp_path / "coded").config.model
  sparse = config.num_layers - config.num_dense_layers
  assert made["tensors"].get("experts", 0) == 3 * sparse and made["tensors"]["attention"] == 4 * config.num_layers
  assert 0 < made["drift"]["flips"] < 0.5 if sparse else made["drift"]["flips"] == made["drift"]["count_drift"] == 0
  logits, theirs, exported = ours(tmp_path / "coded")
  np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-4)
  assert exported["family"] == case.partition("3_")[0] and (tmp_path / "coded_out" / "tokenizer.json").is_file()
  before = peer(case)(torch.tensor(np.random.default_rng(0).integers(0, VOCAB, (2, 40)))).logits.detach().numpy()
  assert 0.01 < np.abs(logits - before).mean() < 0.5 * before.std()
  loaded = load_model(tmp_path / "coded")
  engine = Engine(loaded.config, loaded.params, loaded.router_state, capacity=32, chunk=8)
  assert len(list(engine.generate([Request([1, 7, 3], max_tokens=5)]))) == 5


@pytest.mark.parametrize("case", [DENSE, CASES[1], NORMED])
def test_adapters_merged_and_out_again(case, imported, text, tmp_path):
  train = ("--config.train.steps=3", "--config.train.learning_rate=0.02", "--config.train.warmup_steps=1")
  router = ("--config.adapt.router=held", "--config.adapt.lora_rank=4")
  made = adapt("lora", imported(case), tmp_path / "lora", *data(text), *train, *router)
  before, after = (tensors(load_model(run).params) for run in (imported(case), tmp_path / "lora"))
  for path, leaf in before.items():
    assert path[-1] == "router_DE" or np.array_equal(leaf, after[path]), path
  added = after.keys() - before.keys()
  assert added and all(part_of(path[-1]) in ("a", "b") for path in added)
  assert made["drift_target"]["loss_after"] != made["drift_target"]["loss_before"]
  info = json.loads((tmp_path / "lora" / "run.json").read_text())
  assert info["base"]["workdir"] == str(imported(case)) and info["imported"]["family"]
  adapt("merge", tmp_path / "lora", tmp_path / "merged")
  whole, theirs, exported = ours(tmp_path / "merged")
  np.testing.assert_allclose(whole, theirs, rtol=0, atol=2e-4)
  beside, theirs, _ = ours(tmp_path / "lora")  # what goes out is merged by itself
  np.testing.assert_allclose(beside, theirs, rtol=0, atol=2e-4)
  np.testing.assert_allclose(beside, whole, rtol=0, atol=2e-4)
  assert exported["family"] == case.partition("3_")[0]


def test_without_a_tokenizer_it_is_a_line(text, tmp_path):
  save("llama", tmp_path / "theirs")
  import_checkpoint(tmp_path / "theirs", tmp_path / "run", ["convert"])
  for mode in ("quantise", "lora"):
    with pytest.raises(UserError, match="--base=.*run has no tokenizer"):
      adapt(mode, tmp_path / "run", tmp_path / "new", *data(text))
  assert not (tmp_path / "new").exists()
