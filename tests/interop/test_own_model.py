"""A model of our own, exported: its PyTorch file gives the same logits, counts and tokens."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import torch
import transformers

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.errors import UserError
from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.run import open_run
from moe_lab.train.convert import export_run
from moe_lab.train.load import load_model
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state

VOCAB = 64
SMALL = dict(dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=6, expert_dim=10, dense_dim=20)
CASES = {
  "curvature": ({}, dict(k_max=4)),
  "any_budget": (dict(num_dense_layers=1, sharpen_from=16), dict(k_max=4, budget_range=(1.0, 4.0))),
  "at_most_sigmoid": (dict(qk_norm=False, num_shared_experts=1), dict(k_max=3, budget_mode="at_most", gate="sigmoid")),
  "leave_one_out": (dict(tie_embeddings=True), dict(k_max=4, learner="leave_one_out", standardise=False)),
  "value_by_token": (
    dict(position="rotary", rotary_stretch=(4.0, 1.0, 4.0, 16.0)),
    dict(k_max=4, learner="value", policy_input="token", budget_range=(1.0, 4.0)),
  ),
  "topk_groups": (
    dict(position_interpolation=2.0, shared_dim=14, shared_gate=True, scale_embeddings=False, qkv_bias=True),
    dict(method="topk", k=2, expert_groups=3, groups_kept=2, bias_update_rate=0.01),
  ),
}


def trained_run(case, workdir):
  """Writes a run whose every number is random, calibrations included."""
  model, routing = CASES[case]
  config = Config(ModelConfig(**SMALL | model), RoutingConfig(**routing), DataConfig(vocab_size=VOCAB))
  state = jax.jit(lambda: initial_state(config, make_optimizer(config.train)))()
  rng = np.random.default_rng(1)

  def drawn(leaf):
    if leaf.ndim < 3:
      return leaf + 0.4 * rng.normal(size=leaf.shape).astype(np.float32)
    return (1.3 * rng.normal(size=leaf.shape) * config.model.dim**-0.5).astype(np.float32)

  routed = state.router_state
  method = {name: value + 0.0 for name, value in routed.method.items()}
  if "threshold" in method:  # about the median of what the policy predicts, so that counts differ
    method["threshold"] = method["threshold"] + 0.5 * rng.normal(size=method["threshold"].shape).astype(np.float32)
  routed = routed._replace(bias_E=drawn(routed.bias_E), count_shift=routed.count_shift + np.float32(0.3), method=method)
  state = state._replace(params=jax.tree.map(drawn, state.params), router_state=routed)
  with open_run(workdir, config, fingerprint="", manifest=[], argv=["train"]), Checkpointer(workdir, 1) as checkpointer:
    checkpointer.save(1, state, {})
  return workdir


@pytest.mark.parametrize("case", CASES)
def test_logits_counts_and_tokens_are_ours(case, tmp_path):
  run = trained_run(case, tmp_path / "run")
  export_run(run, tmp_path / "exported", family="moe_lab", dtype=None, step=None)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
  loaded = load_model(run)
  routing = loaded.config.routing
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
  apply = jax.jit(loaded.model.apply)
  for budget in {loaded.budget, *routing.budgets}:
    out = apply(
      {"params": loaded.params}, jnp.asarray(tokens), jnp.ones_like(tokens), jnp.full(2, budget), loaded.router_state
    )
    with torch.no_grad():
      found = theirs(torch.tensor(tokens), budget=budget)
    counts = np.asarray(out.stats.count_T).reshape(-1, *tokens.shape)
    np.testing.assert_array_equal(found.experts.numpy(), counts)
    if not routing.fixed and routing.budgets[0] < budget < routing.k_max:
      assert len(np.unique(counts)) > 1  # or equal counts would say little
    assert found.logits.std() > 0.5
    np.testing.assert_allclose(found.logits.numpy(), out.logits_BLV, rtol=0, atol=1e-4)

  prompt = tokens[0, :6].tolist()
  engine = Engine(loaded.config, loaded.params, loaded.router_state, capacity=64, chunk=8, budget=loaded.budget)
  made = [token for _, token in engine.generate([Request(prompt, max_tokens=50)])]
  more = theirs.generate(torch.tensor([prompt]), max_new_tokens=50, do_sample=False)[0, len(prompt) :].tolist()
  assert [token.token for token in made] == more


def test_padding_on_the_left_changes_nothing(tmp_path):
  run = trained_run("any_budget", tmp_path / "run")
  export_run(run, tmp_path / "exported", family=None, dtype=None, step=None)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
  tokens = torch.arange(1, 21)[None]
  padded, mask = torch.nn.functional.pad(tokens, (3, 0)), torch.nn.functional.pad(torch.ones_like(tokens), (3, 0))
  with torch.no_grad():
    alone, beside = theirs(tokens), theirs(padded, attention_mask=mask)
  torch.testing.assert_close(beside.logits[:, 3:], alone.logits, rtol=0, atol=1e-5)
  assert torch.equal(beside.experts[..., 3:], alone.experts) and not beside.experts[..., :3].any()


def test_the_umask_decides_who_may_read_an_export(tmp_path):
  run = trained_run("topk_groups", tmp_path / "run")
  before = os.umask(0o027)
  try:
    export_run(run, tmp_path / "exported", family=None, dtype=None, step=None)
  finally:
    os.umask(before)
  modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "exported").rglob("*")}
  assert modes == {False: 0o640} and (tmp_path / "exported").stat().st_mode & 0o777 == 0o750


def test_what_cannot_be_exported_is_a_line(tmp_path):
  run = trained_run("curvature", tmp_path / "run")
  for family, words in (("lama", "did you mean 'llama'"), ("llama", "wanted moe_lab, since .* has a balance bias")):
    with pytest.raises(UserError, match=words):
      export_run(run, tmp_path / "exported", family=family, dtype=None, step=None)
  with pytest.raises(UserError, match="--dtype=float8: wanted one of"):
    export_run(run, tmp_path / "exported", family=None, dtype="float8", step=None)
  with pytest.raises(UserError, match="no checkpoint of step 7"):
    export_run(run, tmp_path / "exported", family=None, dtype=None, step=7)
  other = dataclasses.replace(load_model(run).config, routing=RoutingConfig(method="top_p", k_max=4))
  with open_run(tmp_path / "other", other, fingerprint="", manifest=[], argv=["train"]):
    with Checkpointer(tmp_path / "other", 1) as checkpointer:
      checkpointer.save(1, jax.jit(lambda: initial_state(other, make_optimizer(other.train)))(), {})
  for family, words in (
    (None, "routing.method = 'top_p': wanted one of dynamic, topk, to be exported"),
    ("llama", "config.*: wanted .* for a llama model"),
  ):
    with pytest.raises(UserError, match=words):
      export_run(tmp_path / "other", tmp_path / "exported", family=family, dtype=None, step=None)
  assert not (tmp_path / "exported").exists() and not list(tmp_path.glob(".*"))
