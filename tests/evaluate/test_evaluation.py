"""Evaluation sums what it says, and controls keep the compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.evaluate.controls import (
  cheapest_for_budget,
  counts_by_layer,
  counts_by_token,
  fixed_count,
  oracle_counts,
  shuffled_counts,
)
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.evaluate.perplexity import evaluate, make_eval_step
from moe_lab.evaluate.removal import loss_rises, without_expert
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.registry import make_router
from moe_lab.types import Batch

CONFIG = Config(
  ModelConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=5, expert_dim=6),
  RoutingConfig(k_max=4),
  DataConfig(vocab_size=30, seq_len=11),
)


@pytest.fixture(scope="module")
def setting():
  state, token = make_router(CONFIG.routing).initial_state(2, 5), jnp.ones((1, 4), jnp.int32)
  model = Transformer(CONFIG)
  rng = np.random.default_rng(0)
  # Random, the policy too: counts differ from token to token. Only shapes are asked of `init`, which is slow to run.
  shapes = jax.eval_shape(model.init, jax.random.key(0), token, token, jnp.full(1, 2.0), state)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)["params"]
  batches = []
  for last in (False, True):
    tokens, segments = rng.integers(0, 30, (4, 12)).astype(np.int32), np.ones((4, 12), np.int32)
    segments[1, 5:] = 2
    if last:
      segments[2:] = 0  # rows that fill up the last batch
    batches.append(Batch(tokens, segments, tokens % 3))
  return model, params, state, batches, make_eval_step(CONFIG, model)


def run(setting, **arguments):
  _, params, state, batches, eval_step = setting
  names = ("a", "b", "c", "never")
  return evaluate(eval_step, params, state, batches, 2.0, class_names=names, slots=4, **arguments)


def test_evaluation_against_plain_loops(setting):
  model, params, state, batches, eval_step = setting
  bytes_per_token = np.arange(30) % 5
  result = run(setting, bytes_per_token=bytes_per_token)
  losses, counts, num_bytes, histogram = {0: [], 1: [], 2: []}, {0: [], 1: [], 2: []}, 0, np.zeros((2, 5))
  for batch in batches:
    out = jax.jit(model.apply)(
      {"params": params}, batch.tokens[:, :-1], batch.segments[:, :-1], jnp.full(4, 2.0), state
    )
    log_prob, count = jax.nn.log_softmax(out.logits_BLV), np.asarray(out.stats.count_T).reshape(2, 4, 11)
    for row, t in np.ndindex(4, 11):
      if batch.segments[row, t]:
        histogram[[0, 1], count[:, row, t]] += 1
      if batch.segments[row, t] and batch.segments[row, t] == batch.segments[row, t + 1]:
        target = batch.tokens[row, t + 1]
        losses[target % 3].append(-float(log_prob[row, t, target]))
        counts[target % 3].append(count[:, row, t].mean())
        num_bytes += bytes_per_token[target]
  everything = sum(losses.values(), [])
  assert result["tokens"] == len(everything) == 4 * 11 - 1 + 2 * 11 - 1
  assert result["loss"] == pytest.approx(np.mean(everything), rel=1e-5)
  assert result["bits_per_byte"] == pytest.approx(np.sum(everything) / np.log(2) / num_bytes, rel=1e-5)
  assert result["by_class"].keys() == {"a", "b", "c"}
  for index, name in enumerate("abc"):
    assert result["by_class"][name]["loss"] == pytest.approx(np.mean(losses[index]), rel=1e-5)
    assert result["by_class"][name]["mean_experts"] == pytest.approx(np.mean(counts[index]))
  np.testing.assert_allclose(result["k_histogram"], histogram / histogram.sum(1, keepdims=True))
  assert len(np.flatnonzero(histogram.sum(0))) > 1


def test_controls_keep_the_compute(setting):
  _, params, state, _, eval_step = setting
  own = run(setting)
  shuffled = run(setting, decide=shuffled_counts(eval_step, params, state, 2.0, seed=0))
  np.testing.assert_allclose(shuffled["k_histogram"], own["k_histogram"])
  assert shuffled["loss"] != own["loss"]
  fixed = run(setting, decide=fixed_count(2, 3))
  assert fixed["mean_experts"] == 3


def test_loss_without_an_expert(setting):
  model, params, state, batches, eval_step = setting
  found = loss_rises(eval_step, params, state, batches, 2.0)
  rise = np.array(found["rise"])
  assert rise.shape == (2, 5) and found["loss"] == pytest.approx(run(setting)["loss"], rel=1e-6)
  assert found["max_rise"] == rise[found["layer"], found["expert"]] == rise.max()
  # By hand: under that state the expert gets no token of its layer, and the loss is what the rise says.
  without = evaluate(
    eval_step, params, without_expert(state, 1, 3), batches, 2.0, class_names=("a", "b", "c", "never"), slots=4
  )
  assert without["load"][1][3] == 0 and min(without["load"][0]) > 0
  assert without["loss"] - found["loss"] == pytest.approx(rise[1, 3], abs=1e-6)
  assert run(setting)["load"][1][3] > 0 and abs(rise[1, 3]) > 1e-4


def test_the_oracles_pick_by_hand():
  # Counts 1, 2, 4. Token 0 gains 1.0 by the second expert and nothing more, token 1 0.6 by the second and 1.0 by the
  # next two (0.8 by three: no hull corner at 2), token 2 nothing. Gains per expert: 1.0; 1.6 / 3 = 0.533; 0.
  nll_AT = np.array([[2.0, 3.0, 1.0], [1.0, 2.4, 1.0], [1.0, 1.4, 1.0]])
  np.testing.assert_array_equal(cheapest_for_budget(nll_AT, (1, 2, 4), 1.0), [1, 1, 1])
  np.testing.assert_array_equal(cheapest_for_budget(nll_AT, (1, 2, 4), 4 / 3), [2, 1, 1])
  np.testing.assert_array_equal(cheapest_for_budget(nll_AT, (1, 2, 4), 7 / 3), [2, 4, 1])
  np.testing.assert_array_equal(cheapest_for_budget(nll_AT, (1, 2, 4), 4.0), [4, 4, 4])  # paid to spend


def test_the_oracle_beats_any_other_counts_of_its_mean():
  rng = np.random.default_rng(0)
  nll_AT = rng.normal(size=(3, 500))
  count_T = cheapest_for_budget(nll_AT, (1, 2, 4), 2.0)
  assert count_T.mean() == pytest.approx(2.0, abs=2 / 500)
  loss = nll_AT[np.searchsorted([1, 2, 4], count_T), np.arange(500)].mean()
  for seed in range(5):
    shuffled = np.random.default_rng(seed).permutation(count_T)
    assert loss < nll_AT[np.searchsorted([1, 2, 4], shuffled), np.arange(500)].mean() - 0.3


def test_controls_that_know_less_or_more(setting):
  _, params, state, batches, eval_step = setting
  own = run(setting)
  by_layer = run(setting, decide=counts_by_layer(eval_step, params, state, 2.0, batches, seed=0))
  # 60 to 66 tokens a layer: dithering alone has a standard error of at most 0.5 / 8.
  np.testing.assert_allclose(by_layer["mean_experts_by_layer"], own["mean_experts_by_layer"], atol=0.2)
  assert all(np.count_nonzero(row) <= 2 for row in by_layer["k_histogram"])
  by_token = run(setting, decide=counts_by_token(eval_step, params, state, 2.0, batches, 30, seed=0))
  np.testing.assert_allclose(by_token["mean_experts_by_layer"], own["mean_experts_by_layer"], atol=0.2)
  oracle = run(setting, decide=oracle_counts(eval_step, params, state, 2.0, (1, 2, 4)))
  assert oracle["mean_experts"] == pytest.approx(2.0, abs=0.1)  # a step is up to 3 experts, of some 30 tokens a batch
  assert oracle["loss"] < run(setting, decide=fixed_count(2, 2))["loss"]


def test_flops_by_hand():
  # D 16, H 8, N 2, M 1: projections 2 * 16 * (2 * 2 + 2 * 1) * 8 = 1536 a layer; scores 4 * 2 * 8 * 10 = 640 a layer;
  # experts 6 * 16 * 6 * 1.5 = 864 a layer; head 2 * 16 * 30 = 960; router 2 * 16 * 5 = 160 and the policy's head
  # 2 * (21 * 8 + 8 * 3) = 384 a layer: it reads D, the budget and four ranked log gates, and values the second to the
  # fourth expert.
  flops = forward_flops_per_token(CONFIG, mean_experts=1.5, mean_context=10)
  assert flops == {
    "attention_projections": 3072, "attention_scores": 1280, "router": 2 * (160 + 384), "experts": 1728,
    "dense_mlp": 0, "head": 960, "total": 3072 + 1280 + 1088 + 1728 + 960,
  }  # fmt: skip


def test_flops_are_near_the_compilers_count():
  # One layer (a scan's body is counted once), all experts executed, the whole matrix of scores: then the compiler
  # counts what the formula does, plus elementwise work.
  model = ModelConfig(
    dim=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4, expert_dim=96,
    num_shared_experts=1, dispatch="dense", attention_backend="reference",
  )  # fmt: skip
  config, length = Config(model, RoutingConfig(k_max=4), DataConfig(vocab_size=256, seq_len=32)), 32
  token = jax.ShapeDtypeStruct((2, length), jnp.int32)
  arguments = (
    token,
    token,
    jax.ShapeDtypeStruct((2,), jnp.float32),
    jax.eval_shape(lambda: make_router(config.routing).initial_state(1, 4)),
  )
  variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), *arguments)
  logits = jax.jit(lambda *a: Transformer(config).apply(*a).logits_BLV)
  counted = logits.lower(variables, *arguments).compile().cost_analysis()["flops"]
  ours = forward_flops_per_token(config, mean_experts=4, mean_context=length)["total"] * 2 * length
  assert 0.97 * counted < ours < counted, (ours, counted)
