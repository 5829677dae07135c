"""A plan for one accelerator, against the arrays of a model in 4 bits, its cache, and a trace of its routing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_lab.adapt.quantise import quantised
from moe_lab.adapt.tensors import tensors
from moe_lab.errors import ConfigError, UserError
from moe_lab.infer.cache import empty_cache
from moe_lab.infer.engine import Engine
from moe_lab.infer.placement import served
from moe_lab.preflight.residency import FAMILIES, family_of, lru_misses, plan, report, table
from tests.adapt.models import CONFIG, adapted, begun, outputs

LARGE = 10**10
PLAN = dict(context=100, chunk=8, reserve=1000, sequences=3)


@functools.cache
def coded():
  """Returns a model as it begins, and its parameters in 4 bits."""
  state = begun()
  return state, quantised(state.params, "nf4")


def typed(dtype, **fields):
  """Returns the model's configuration in 4 bits, with activations of a type."""
  config = adapted(weights="nf4")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype, **fields))


def some_resident(number, load_ZE=None, budget=None):
  """Returns a plan whose memory is exactly so large that `number` of eight experts stay.

  With four it had room for all, since nothing is moved then and needs none.
  """
  config = adapted(weights="nf4")
  whole = plan(config, LARGE, **PLAN)
  memory = whole.fixed + config.routing.slots * whole.expert + number * whole.expert
  return plan(config, memory, **PLAN, load_ZE=load_ZE, budget=budget)


@functools.cache
def trace():
  """Returns what each token of a batch takes in each layer, of the model in 4 bits: expert_ZTK, valid_ZTK."""
  state, params = coded()
  choice = outputs(params, state, traced=True).stats.choice
  return np.asarray(choice.expert_TK), np.asarray(choice.valid_TK)


def rows_of(expert_ZTK, valid_ZTK, num_experts=4):
  """Returns rows by expert, [Z, E]."""
  return np.stack([np.bincount(e[v], minlength=num_experts) for e, v in zip(expert_ZTK, valid_ZTK, strict=True)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_arrays_that_an_engine_holds(dtype):
  config = typed(dtype)
  made = plan(config, LARGE, **PLAN)
  state, params = coded()
  held = served(params, config.model)
  wanted = dict.fromkeys(FAMILIES, 0)
  for path, leaf in tensors(held).items():
    wanted[family_of(path)] += leaf.nbytes
  wanted["routing_state"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.router_state))
  assert made.weights == wanted
  assert sum(made.weights.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves((held, state.router_state)))
  # By hand: 16 codes of half a byte and a scale are a group; 32 inputs are two, and so are 24.
  assert made.expert == (2 * 24 * 2 + 2 * 32) * (8 + 1)
  assert made.weights["experts"] == 2 * 4 * made.expert
  assert made.weights["embedding"] == made.weights["head"] == 32 * 32 * (4 if dtype == "float32" else 2)
  assert made.weights["norms"] == 4 * (7 * 32 + 2 * 3 * 16)  # two in each of three layers and a last one; QK-norm
  assert all(made.weights.values())


@pytest.mark.parametrize(("dtype", "groups"), [("float32", 0), ("bfloat16", 1)])
@pytest.mark.parametrize(("context", "chunk", "sequences"), [(100, 8, 3), (1000, 7, 1)])
def test_the_cache_is_what_the_engine_allocates(dtype, groups, context, chunk, sequences):
  fields = dict(num_kv_heads=2, position="alibi", qk_norm=True, qk_bound=8.0, num_global_groups=groups)
  config = typed(dtype, **fields)
  made = plan(config, LARGE, context, chunk=chunk, sequences=sequences)
  cache = empty_cache(config.model, sequences, context, chunk)
  assert made.cache == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
  if groups and context == 1000:
    assert made.cache < 3 * 1000 * 2 * 2 * 16 * 2  # one group keeps a window only


def test_an_engine_of_the_model_in_4_bits_says_the_same():
  state, params = coded()
  config = adapted(weights="nf4")
  engine = Engine(config, params, state.router_state, slots=3, capacity=100, chunk=8)
  assert plan(config, LARGE, **PLAN).cache == engine.cache_bytes


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_what_is_moved_is_what_a_trace_misses(number):
  expert_ZTK, valid_ZTK = trace()
  rows_ZE, tokens = rows_of(expert_ZTK, valid_ZTK), expert_ZTK.shape[1]
  made = some_resident(number, rows_ZE, budget=rows_ZE.sum() / tokens / 2)
  assert made.resident_ZE.sum() == number
  missed = 0
  for z in range(2):
    for t in range(tokens):
      for expert, valid in zip(expert_ZTK[z, t], valid_ZTK[z, t], strict=True):
        missed += valid and not made.resident_ZE[z, expert]
  assert made.moved_per_token == pytest.approx(missed * made.expert / tokens, rel=1e-12)
  assert made.moved_per_token <= some_resident(number, budget=made.budget).moved_per_token  # an even load is the worst


def test_a_cache_of_recent_experts_on_the_same_trace():
  expert_ZTK, valid_ZTK = trace()
  rows_ZE, taken = rows_of(expert_ZTK, valid_ZTK), valid_ZTK.sum()
  missed = [lru_misses(expert_ZTK, valid_ZTK, capacity).sum() for capacity in range(5)]
  for capacity in range(5):
    # The slow definition: an expert is held if fewer others than there is room for were taken, or taken later, since.
    slow = 0
    for z in range(2):
      recent = []
      for expert_K, valid_K in zip(expert_ZTK[z], valid_ZTK[z], strict=True):
        slow += sum(expert not in recent[:capacity] for expert in expert_K[valid_K])
        recent = [*expert_K[valid_K], *(e for e in recent if e not in expert_K[valid_K])]
    assert missed[capacity] == slow
  assert missed[0] == taken and missed[4] == (rows_ZE > 0).sum()  # each once, the first time
  assert missed == sorted(missed, reverse=True)


def test_recent_experts_by_hand():
  # One expert a token, room for two: 0 1 0 2 1 0 misses 0, 1, then hits 0, misses 2 (1 goes), 1 (0 goes), 0 (2 goes).
  expert_ZTK = np.array([0, 1, 0, 2, 1, 0]).reshape(1, 6, 1)
  valid_ZTK = np.ones((1, 6, 1), bool)
  assert lru_misses(expert_ZTK, valid_ZTK, 2).tolist() == [5]
  assert lru_misses(expert_ZTK, valid_ZTK, 3).tolist() == [3]
  assert lru_misses(expert_ZTK, valid_ZTK, 1).tolist() == [6]
  assert lru_misses(expert_ZTK, valid_ZTK, 0).tolist() == [6]


def test_a_token_that_takes_several():
  # {2, 1} misses both, its best, 2, is the more recent; {2} hits; {0, 1} misses 0 and finds 1; then 0 and 1 are held.
  expert_ZTK = np.array([[[2, 1], [2, 3], [0, 1], [1, 2]]])
  valid_ZTK = np.array([[[True, True], [True, False], [True, True], [True, True]]])
  assert lru_misses(expert_ZTK, valid_ZTK, 2).tolist() == [4]
  # Room for one holds the best of each: 2, 2, 0, 1. Only the second token finds its own.
  assert lru_misses(expert_ZTK, valid_ZTK, 1).tolist() == [6]
  # Caches of their own, of sizes of their own; padding takes nothing.
  two = np.concatenate([expert_ZTK, expert_ZTK]), np.concatenate([valid_ZTK, valid_ZTK & False])
  assert lru_misses(*two, [2, 0]).tolist() == [4, 0]
  assert lru_misses(two[0], np.concatenate([valid_ZTK, valid_ZTK]), [2, 1]).tolist() == [4, 6]


def test_tokens_of_a_step_share_what_they_fetch():
  # Steps {2, 1}, {2, 3}; {0, 1}; {1, 2}: the first misses 1, 2 and 3 and leaves 3 and 2, its last token's, of which 2
  # is the last used; the second misses 0 and 1; the third finds 1 and misses 2.
  expert_ZTK = np.array([[[2, 1], [2, 3], [0, 1], [1, 2]]])
  valid_ZTK = np.ones((1, 4, 2), bool)
  steps = np.array([0, 0, 1, 2])
  assert lru_misses(expert_ZTK, valid_ZTK, 2, steps).tolist() == [3 + 2 + 1]
  assert lru_misses(expert_ZTK, valid_ZTK, 4, steps).tolist() == [4]
  assert lru_misses(expert_ZTK, valid_ZTK, 0, steps).tolist() == [3 + 2 + 2]
  assert lru_misses(expert_ZTK, valid_ZTK, 2, np.zeros(4)).tolist() == [4]
  np.testing.assert_array_equal(
    lru_misses(expert_ZTK, valid_ZTK, 2, np.arange(4)), lru_misses(expert_ZTK, valid_ZTK, 2)
  )


def test_all_tokens_on_one_expert():
  load_ZE = np.zeros((2, 4))
  load_ZE[0, 3] = load_ZE[1, 1] = 7
  with pytest.raises(UserError, match="--budget=2: with this load a token would take an expert 2.00 times"):
    some_resident(1, load_ZE)
  none, one, two = (some_resident(n, load_ZE, budget=1.0) for n in (0, 1, 2))
  assert none.moved_per_token == 2 * none.expert
  assert one.moved_per_token == one.expert and one.resident_ZE[1, 1]
  assert two.moved_per_token == 0 and two.resident_ZE.tolist() == (load_ZE > 0).tolist()
  same_ZTK = np.full((1, 9, 1), 3)
  assert lru_misses(same_ZTK, same_ZTK > 0, 1).tolist() == [1]


def test_an_even_load_stays_alike_in_all_layers():
  made = some_resident(3)
  assert made.resident_ZE.sum(1).tolist() == [2, 1]
  # Two of four experts a token: half of two missing experts, and of three.
  np.testing.assert_allclose(made.missed_Z, [1.0, 1.5])
  assert made.moved_per_token == 2.5 * made.expert


def test_everything_and_nothing_resident():
  config = adapted(weights="nf4")
  whole = plan(config, LARGE, **PLAN)
  assert whole.resident_ZE.all() and whole.staging == whole.offloaded == whole.moved_per_token == 0
  assert whole.resident == sum(whole.weights.values()) + whole.cache + 1000
  just = plan(config, whole.resident, **PLAN)
  assert just.resident_ZE.all() and just.staging == 0
  less = plan(config, whole.resident - 1, **PLAN)  # of which four experts' room is for those that are moved
  assert less.staging == 4 * less.expert and less.resident_ZE.sum() == 3
  assert less.resident <= less.memory < less.resident + less.expert
  nothing = some_resident(0)
  assert nothing.resident == nothing.fixed == nothing.memory
  assert nothing.offloaded == nothing.weights["experts"] and nothing.moved_per_token == 2 * 2 * nothing.expert


def test_what_cannot_be_planned_is_one_line():
  config = adapted(weights="nf4")
  least = some_resident(0).memory
  with pytest.raises(UserError, match="wanted at least 0.00 GB for all but the experts") as error:
    plan(config, least - 1, **PLAN)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="--budget=5: wanted a number from 1 to 4"):
    plan(config, LARGE, **PLAN, budget=5)
  fixed = dataclasses.replace(config, routing=dataclasses.replace(config.routing, method="topk", k=2))
  with pytest.raises(UserError, match="--budget=3: wanted 2"):
    plan(fixed, LARGE, **PLAN, budget=3)
  with pytest.raises(ConfigError, match="config.adapt.lora_rank = 4"):
    plan(adapted(weights="nf4", lora_rank=4), LARGE, **PLAN)


def test_a_dense_model_moves_nothing():
  config = adapted(weights="nf4")
  model = dataclasses.replace(config.model, num_dense_layers=3, num_shared_experts=0)
  config = dataclasses.replace(config, model=model, routing=dataclasses.replace(config.routing, method="topk"))
  made = plan(config, LARGE, **PLAN)
  assert made.expert == made.weights["experts"] == made.moved_per_token == made.resident_ZE.size == 0
  assert "0 experts in host memory" in table(report(config, made, 100, 3))


def test_the_report_adds_up():
  config = adapted(weights="nf4")
  made = some_resident(3)
  result = report(config, made, 100, 3)
  assert result["experts_resident"] == sum(result["experts_resident_by_layer"]) == 3 and result["experts"] == 8
  assert result["moved_bytes_per_token"] == result["missed_per_token"] * result["expert_bytes"] == 2.5 * made.expert
  assert result["taken_per_token"] == 2 * CONFIG.routing.budget
  lines = table(result)
  assert "3 of 8 of" in lines and "4.0 experts, 2 a layer" in lines
