"""Adapters: shapes and ranks, that they alone learn, that merging keeps the model, and the router's three ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.adapt.learning import ROUTING, join, split
from moe_lab.adapt.lora import adapter_coverage, adapters, merged, rank
from moe_lab.adapt.quantise import plain, quantised
from moe_lab.adapt.tensors import params_of, part_of, tensors
from moe_lab.errors import UserError
from moe_lab.evaluate.drift import Routed, routing_drift
from moe_lab.nn.weights import ADAPTER_SCALE
from moe_lab.train.metrics import summarise
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import abstract_plain_params, abstract_state
from tests.adapt.models import CONFIG, adapted, batches, outputs, run_steps, trained

LORA = adapted(lora_rank=4)


def begun(config=LORA, seed=3):
  """Returns a state with adapters beside the trained weights, in the form of the configuration."""
  base = trained()
  params = base.params
  if config.adapt.weights != "float32":
    params = quantised(params, config.adapt.weights)
  params = join(adapters(abstract_plain_params(config), config, jax.random.key(seed)), params)
  opt_state = make_optimizer(config.train).init(split(params, config.adapt)[0])
  return base._replace(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def stirred(params, seed=0):
  """Returns parameters whose adapters are not zero."""
  rng = np.random.default_rng(seed)
  return params_of({
    path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32) if part_of(path[-1]) in ("a", "b") else leaf
    for path, leaf in tensors(params).items()
  })  # fmt: skip


def test_an_experts_rank_is_shared_by_the_experts_of_a_token():
  assert rank(LORA, "attention") == 4 and rank(LORA, "experts") == 2  # two experts a token
  many = dataclasses.replace(LORA, routing=dataclasses.replace(LORA.routing, budget=4.0))
  assert rank(dataclasses.replace(many, adapt=dataclasses.replace(many.adapt, lora_rank=1)), "experts") == 1


def test_every_weight_has_an_adapter():
  params = abstract_plain_params(LORA)
  added = adapters(params, LORA, jax.random.key(0))
  report = adapter_coverage(params, added, LORA)
  assert report["tensors"] == {"attention": 12, "experts": 6, "mlp": 9}
  shapes = {path: leaf.shape for path, leaf in tensors(added).items()}
  assert shapes[("moe_layers", "moe", "gate_a_EDI")] == (2, 4, 32, 2)
  assert shapes[("moe_layers", "moe", "down_b_EID")] == (2, 4, 2, 32)
  assert shapes[("moe_layers", "attention", "out_a_NHI")] == (2, 2, 16, 4)
  assert shapes[("dense_layers", "attention", "query_b_INH")] == (1, 4, 2, 16)
  lost = tensors(added)
  for name in ("up_a_EDI", "up_b_EIF"):
    del lost[("moe_layers", "moe", name)]
  with pytest.raises(UserError, match="4 tensors of experts were transformed: wanted 6"):
    adapter_coverage(params, params_of(lost), LORA)
  few = adapted(lora_rank=4, lora_on=("attention",))
  assert adapter_coverage(params, adapters(params, few, jax.random.key(0)), few)["tensors"] == {"attention": 12}


def test_new_adapters_change_nothing():
  base = trained()
  np.testing.assert_array_equal(outputs(begun().params, base).logits_BLV, outputs(base.params, base).logits_BLV)


def test_an_adapter_is_the_product_of_its_halves():
  params = stirred(begun().params)
  moe, base = params["moe_layers"]["moe"], trained().params["moe_layers"]["moe"]
  got = merged(params)["moe_layers"]["moe"]["down_EFD"]
  want = base["down_EFD"] + ADAPTER_SCALE * np.einsum("zefi,zeid->zefd", moe["down_a_EFI"], moe["down_b_EID"])
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("weights", ["float32", pytest.param("int4", marks=pytest.mark.slow)])
def test_merging_keeps_the_model(weights):
  base, params = trained(), stirred(begun(adapted(lora_rank=4, weights=weights)).params)
  whole = merged(plain(params, tensors(abstract_plain_params(LORA))))
  assert tensors(whole).keys() == tensors(base.params).keys()
  got, want = outputs(params, base, traced=True), outputs(whole, base, traced=True)
  np.testing.assert_array_equal(got.stats.count_T, want.stats.count_T)
  np.testing.assert_allclose(got.logits_BLV, want.logits_BLV, atol=2e-4)


def test_halves_that_do_not_belong_together_are_one_line():
  params = tensors(begun().params)
  del params[("moe_layers", "moe", "gate_b_EIF")]
  with pytest.raises(UserError, match="gate_a_EDI was left over"):
    merged(params_of(params))


@pytest.mark.parametrize(
  ("weights", "router"),
  [
    ("float32", "frozen"),
    pytest.param("float32", "trained", marks=pytest.mark.slow),
    pytest.param("nf4", "held", marks=pytest.mark.slow),
  ],
)
def test_only_adapters_and_a_router_that_may_learn(weights, router):
  config = adapted(lora_rank=4, weights=weights, router=router)
  start = begun(config)
  reference = split(trained().params, config.adapt)[0] if router == "held" else None
  state, seen = run_steps(config, start, 3, reference=reference)
  before, after = tensors(start.params), tensors(state.params)
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  for path in before:
    name = path[-1]
    if part_of(name) in ("a", "b"):
      assert path in moved, path
    elif name not in ROUTING:
      assert path not in moved, path
  routers = {path[-1] for path in moved if path[-1] in ROUTING}
  assert ("router_DE" in routers) == (router != "frozen")
  same_state = jax.tree.map(np.array_equal, start.router_state, state.router_state)
  assert all(jax.tree.leaves(same_state)) == (router == "frozen")
  assert ("router_kl" in seen[0].losses) == (router == "held")
  abstract = abstract_state(config)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), (abstract.params, abstract.opt_state)) == jax.tree.map(
    lambda x: (x.shape, x.dtype), (state.params, state.opt_state)
  )


@pytest.mark.slow
def test_adapters_beside_4_bits_lower_the_loss():
  config = adapted(lora_rank=4, weights="int4")
  _, seen = run_steps(config, begun(config), 30, seed=21)
  losses = [summarise(metrics)["loss"] for metrics in seen]
  assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_gradients_of_adapters_equal_those_through_the_merged_weights():
  base, params = trained(), stirred(begun().params)
  learning, frozen = split(params, adapted(lora_rank=4, router="frozen").adapt)

  def loss(learning, whole):
    params = join(learning, frozen)
    logits = outputs(merged(params) if whole else params, base).logits_BLV
    return jnp.square(logits).mean()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  got, want = (gradient(learning, whole) for whole in (False, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 + 1e-3 * np.abs(b).max()), got, want)


@pytest.mark.slow
def test_a_held_router_stays_nearer():
  finetune = {
    router: dataclasses.replace(
      adapted(router=router, router_kl_weight=20.0), train=dataclasses.replace(CONFIG.train, learning_rate=3e-2)
    )
    for router in ("trained", "held")
  }
  base, kl = trained(), {}
  for router, config in finetune.items():
    start = base._replace(step=jnp.zeros((), jnp.int32), opt_state=make_optimizer(config.train).init(base.params))
    state, _ = run_steps(config, start, 15, seed=30, reference=base.params if router == "held" else None)
    kl[router] = routing_drift(
      CONFIG, Routed(base.params, base.router_state), Routed(state.params, state.router_state), batches(2, seed=31)
    )["router_kl"]
  assert kl["held"] < 0.5 * kl["trained"]
