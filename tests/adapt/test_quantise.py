"""Experts and projections in 4 bits: what is touched, what is counted, and what it does to a trained model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.adapt.quantise import calibrated, coverage, input_squares, plain, quantised
from moe_lab.adapt.tensors import params_of, tensors
from moe_lab.errors import UserError
from moe_lab.evaluate.drift import Routed, routing_drift
from moe_lab.infer.placement import served
from moe_lab.nn.transformer import Transformer, unstack_layers
from moe_lab.nn.weights import FAMILY
from moe_lab.ops.quantised import BOOKS
from moe_lab.train.state import abstract_plain_params, abstract_state
from tests.adapt.models import CONFIG, adapted, batches, outputs, trained


@functools.cache
def make(book):
  state = trained()
  return state, *calibrated(CONFIG, state.params, state.router_state, batches(2, seed=5), book)


@pytest.mark.parametrize("book", [pytest.param("int4", marks=pytest.mark.slow), "nf4"])
def test_every_expert_and_projection_is_in_4_bits_and_nothing_else(book):
  state, params, report = make(book)
  # One dense layer, two with experts and a shared one; four projections in each.
  assert report["tensors"] == {"attention": 12, "experts": 6, "mlp": 3 + 6}
  before, after = tensors(state.params), tensors(params)
  kept = before.keys() & after.keys()
  assert {path[-1] for path in kept} >= {"router_DE", "policy_in", "gain_D", "embedding_VD", "head_VD"}
  assert all(after[path] is before[path] for path in kept)
  for path in after.keys() - kept:
    assert after[path].dtype == (jnp.float8_e4m3fn if "_scale_" in path[-1] else jnp.uint8)
  codes = sum(leaf.nbytes for path, leaf in after.items() if path not in kept)
  assert report["bits_per_weight"] == 8 * codes / report["weights"]
  assert report["weights"] == sum(leaf.size for path, leaf in before.items() if path not in kept)
  assert report["bytes"] == sum(leaf.nbytes for leaf in after.values())


def test_the_form_is_the_configurations():
  _, params, _ = make("nf4")
  abstract = abstract_state(adapted(weights="nf4"))
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), abstract.params
  )
  assert not [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]  # nothing learns


def test_the_model_computes_what_the_unpacked_weights_say():
  state, params, _ = make("nf4")
  unpacked = plain(params, tensors(abstract_plain_params(CONFIG)))
  assert tensors(unpacked).keys() == tensors(state.params).keys()
  got, want = (outputs(p, state) for p in (params, unpacked))
  np.testing.assert_array_equal(got.stats.count_T, want.stats.count_T)
  np.testing.assert_allclose(got.logits_BLV, want.logits_BLV, atol=1e-4)
  # And it is not what it was.
  assert float(jnp.abs(got.logits_BLV - outputs(state.params, state).logits_BLV).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_one_by_one_compute_the_same(dtype):
  state, params, _ = make("int4")
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype=dtype))
  by_layer = served(params, config.model)
  assert tensors(by_layer)[("moe_layers_0", "moe", "gate_int4_EDF")].dtype == jnp.uint8
  (batch,) = batches(1)
  inputs = (batch.tokens[:, :-1], batch.segments[:, :-1], jnp.full(8, 2.0), state.router_state)
  got, want = (
    jax.jit(Transformer(config, unrolled=unrolled).apply)({"params": p}, *inputs).logits_BLV
    for unrolled, p in ((True, by_layer), (False, params))
  )
  np.testing.assert_allclose(got, want, atol=1e-4 if dtype == "float32" else 0.5)


def test_calibration_sees_each_experts_own_tokens():
  state = trained()
  seen = list(batches(2, seed=5))
  squares = input_squares(CONFIG, state.params, state.router_state, seen)
  config = CONFIG.model
  assert squares[("moe_layers", "moe", "gate_EDF")].shape == (2, config.num_experts, config.dim)
  assert squares[("moe_layers", "moe", "down_EFD")].shape == (2, config.num_experts, config.expert_dim)
  assert squares[("moe_layers", "attention", "out_NHD")].shape == (2, config.num_heads, config.head_dim)
  assert squares.keys() == {path for path in tensors(state.params) if path[-1] in FAMILY}
  # The norm before the projections has a mean square of its gain's.
  gain = state.params["dense_layers"]["attention_norm"]["gain_D"][0]
  of_query = squares[("dense_layers", "attention", "query_DNH")][0]
  np.testing.assert_allclose(of_query.sum(), jnp.square(gain).mean() * config.dim, rtol=0.3)
  # Experts are given different tokens.
  by_expert = squares[("moe_layers", "moe", "gate_EDF")][0]
  assert float(jnp.abs(by_expert[0] - by_expert[1]).max()) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("book", BOOKS)
def test_calibration_lowers_the_error_of_products(book):
  state = trained()
  squares = input_squares(CONFIG, state.params, state.router_state, batches(4, seed=5))
  sizes = tensors(abstract_plain_params(CONFIG))

  def error(squares_or_none):
    got = tensors(plain(quantised(state.params, book, squares_or_none), sizes))
    path = ("moe_layers", "moe", "down_EFD")
    return float((squares[path][..., None] * jnp.square(got[path] - tensors(state.params)[path])).sum())

  assert error(squares) < error(None)


@pytest.mark.parametrize("book", [pytest.param("int4", marks=pytest.mark.slow), "nf4"])
def test_a_trained_model_keeps_its_loss_and_mostly_its_routing(book):
  state, params, report = make(book)
  drift = routing_drift(
    CONFIG, Routed(state.params, state.router_state), Routed(params, state.router_state), batches(4, seed=7)
  )
  assert drift["loss_before"] < 2.0  # it has learnt something: ln 32 is 3.5
  assert abs(drift["loss_after"] - drift["loss_before"]) < 0.05
  assert 0 < drift["flips"] < 0.2 and drift["flips"] <= drift["flips_anywhere"]
  assert drift["jaccard"] > 0.85


def test_a_missed_or_foreign_tensor_is_one_line():
  state, params, _ = make("nf4")
  before, after = tensors(state.params), tensors(params)
  path = ("moe_layers", "moe", "up_EDF")
  coded = ("moe_layers", "moe", "up_nf4_EDF")
  scale = ("moe_layers", "moe", "up_scale_EDF")

  def fails(new, words, old=before):
    with pytest.raises(UserError, match=words) as error:
      coverage(params_of(old), params_of(new), CONFIG)
    assert "\n" not in str(error.value)

  fails({k: v for k, v in after.items() if k not in (coded, scale)} | {path: before[path]}, "up_EDF was missed")
  fails({k: v for k, v in after.items() if k != scale}, "up_EDF was lost")
  fails(after | {("moe_layers", "moe", "more_nf4_EDF"): after[coded]}, "more_nf4_EDF was left over")
  foreign = ("moe_layers", "moe", "bilinear_EDF")
  fails(after | {foreign: before[path]}, "bilinear_EDF is a tensor of experts", before | {foreign: before[path]})
  gone = {k: v for k, v in before.items() if k != path}
  fails({k: v for k, v in after.items() if k not in (coded, scale)}, "4 tensors of experts.*wanted 6", gone)


@pytest.mark.slow
def test_unrolled_parameters_are_counted_alike():
  state = trained()
  params = unstack_layers(state.params)
  report = coverage(params, quantised(params, "int4"), CONFIG)
  assert report["tensors"] == make("int4")[2]["tensors"]
