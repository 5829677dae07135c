"""Models of each family with random weights: equal to transformers', and bit for bit the same there and back."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import safetensors.numpy
import torch

from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from moe_lab.train.convert import export_run, import_checkpoint
from moe_lab.train.load import load_model
from tests.interop.checkpoints import CASES, VOCAB, peer, save

PROMPT = [1, 7, 3, 50, 21, 90]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns a function from a case to its checkpoint's folder and the run that it was imported to."""

  @functools.cache
  def of(case):
    folder = tmp_path_factory.mktemp(case)
    save(case, folder / "theirs", max_shard_size="30KB")
    import_checkpoint(folder / "theirs", folder / "run", ["convert"])
    return folder / "theirs", folder / "run"

  return of


@pytest.mark.parametrize("case", CASES)
def test_logits_are_theirs(case, runs):
  loaded = load_model(runs(case)[1])
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 60))
  out = loaded.model.apply(
    {"params": loaded.params}, jnp.asarray(tokens), jnp.ones_like(tokens), jnp.full(2, loaded.budget),
    loaded.router_state,
  )  # fmt: skip
  with torch.no_grad():
    theirs = peer(case)(torch.tensor(tokens)).logits.numpy()
  assert theirs.std() > 0.5  # or it would be no test
  np.testing.assert_allclose(out.logits_BLV, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_fifty_greedy_tokens_are_theirs(case, runs):
  loaded = load_model(runs(case)[1])
  engine = Engine(loaded.config, loaded.params, loaded.router_state, capacity=64, chunk=8)
  ours = [token.token for _, token in engine.generate([Request(PROMPT, max_tokens=50)])]
  theirs = peer(case).generate(torch.tensor([PROMPT]), max_new_tokens=50, do_sample=False)[0, len(PROMPT) :].tolist()
  assert len(set(theirs)) > 5  # not one token again and again
  assert ours == theirs


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_every_bit_is_the_same(case, runs, tmp_path):
  theirs, run = runs(case)
  result = export_run(run, tmp_path / "back", family=None, dtype=None, step=None)
  before, after = _tensors(theirs), _tensors(tmp_path / "back")
  assert result["tensors"] == len(before) and before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
  # And transformers makes the same model of it.
  before, after = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back"))
  before = {key: value for key, value in before.items() if value is not None and key != "transformers_version"}
  assert {key: after.get(key) for key in before} == before  # what was left open may be filled in
  again = type(peer(case)).from_pretrained(tmp_path / "back")
  with torch.no_grad():
    token = torch.tensor([PROMPT])
    torch.testing.assert_close(again(token).logits, peer(case)(token).logits, rtol=0, atol=1e-5)


def _tensors(folder):
  return {
    name: tensor for path in folder.glob("*.safetensors") for name, tensor in safetensors.numpy.load_file(path).items()
  }
