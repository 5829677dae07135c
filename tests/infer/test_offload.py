"""Experts that are fetched when they are taken: the same tokens, and exactly the bytes that a trace says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.adapt.quantise import quantised
from moe_lab.config.adapt import AdaptConfig
from moe_lab.errors import ConfigError, UserError
from moe_lab.infer.engine import Engine
from moe_lab.infer.offload import Offloaded
from moe_lab.infer.request import Request
from moe_lab.infer.residents import Residents, in_order_of_use
from moe_lab.nn.transformer import Transformer
from moe_lab.preflight.residency import lru_misses, plan
from tests.adapt.models import adapted, begun
from tests.infer.models import CONFIGS, VOCAB, make


def prompt(length, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def engine(name, resident=None, **arguments):
  settings = dict(slots=2, capacity=64, chunk=16, steps=4) | arguments
  return Engine(*make(name), resident_experts=resident, **settings)


@functools.cache
def offloaded(name, resident):
  return engine(name, resident)


@functools.cache
def ordinary(name):
  return engine(name)


def responses(served, requests):
  made = [[] for _ in requests]
  for index, token in served.generate(requests):
    made[index].append(token)
  return made


def test_order_of_use():
  expert_TK = np.array([[3, 1, 0], [2, 3, 0], [1, 0, 0]])
  valid_TK = np.array([[True, True, False], [True, True, False], [False, False, False]])
  assert in_order_of_use(expert_TK, valid_TK) == [1, 3, 2]  # 1, 3; then 3, 2: a token's best is its last
  assert in_order_of_use(expert_TK[2:], valid_TK[2:]) == []


def go_through(books, layer, taken):
  """Returns what each pass fetches and computes, by expert."""
  return [([e for e, _ in fetched], set(computed)) for fetched, computed in books.passes(layer, taken)]


def test_books_by_hand():
  books = Residents([2, 1], staging=1)
  assert books.num_slots == 4
  assert go_through(books, 0, [5, 6]) == [([5, 6], {5, 6})]
  assert go_through(books, 0, [6]) == [([], {6})]  # found; now 5 is the oldest
  assert go_through(books, 0, [7]) == [([7], {7})]  # for 5
  assert go_through(books, 0, [6, 7]) == [([], {6, 7})]
  # Three are taken where two stay: 6 is there and goes after use, 5 and 8 come; none is fetched twice.
  assert go_through(books, 0, [6, 5, 8]) == [([5, 8], {6, 5, 8})]
  assert go_through(books, 1, [0, 1, 2, 3]) == [([0, 1], {0, 1}), ([2, 3], {2, 3})]
  assert books.fetched_Z.tolist() == [5, 4]
  assert go_through(books, 1, [3]) == [([], {3})] and go_through(books, 1, []) == []


def test_books_agree_with_the_count_of_a_trace():
  rng = np.random.default_rng(0)
  for capacity in (0, 1, 3, 6):
    books = Residents([capacity], staging=2)
    expert_TK = np.stack([rng.permutation(6)[:4] for _ in range(200)])
    valid_TK = np.arange(4) < rng.integers(0, 5, (200, 1))
    for expert_K, valid_K in zip(expert_TK, valid_TK, strict=True):
      taken = in_order_of_use(expert_K[None], valid_K[None])
      computed = [set(computed) for _, computed in books.passes(0, taken)]
      assert sum(map(len, computed)) == len(set().union(*computed)) == valid_K.sum()  # each once
    assert books.fetched_Z == lru_misses(expert_TK[None], valid_TK[None], capacity)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in sorted(CONFIGS)])
def test_the_same_tokens(name):
  requests = [Request(prompt(n, n), m, temperature=t, seed=n) for n, m, t in ((1, 30, 0), (33, 9, 1), (16, 20, 0))]
  wanted = responses(ordinary(name), requests)
  got = responses(offloaded(name, 2), requests)
  for theirs, ours in zip(wanted, got, strict=True):
    assert [t.token for t in ours] == [t.token for t in theirs] and [t.finish for t in ours] == [
      t.finish for t in theirs
    ]
    assert [t.experts for t in ours] == [t.experts for t in theirs]
    np.testing.assert_allclose([t.log_prob for t in ours], [t.log_prob for t in theirs], atol=1e-5)


@functools.cache
def traced():
  """Returns the compiled full forward pass of "windowed": each token's choice, [Z, T, K]."""
  config, params, state = make("windowed")
  apply = functools.partial(Transformer(config, traced=True).apply, {"params": params})
  return jax.jit(lambda tokens: apply(tokens, tokens * 0 + 1, jnp.full(1, 2.0), state).stats.choice)


def choices(tokens):
  return traced()(np.asarray(tokens, np.int32)[None])


@pytest.mark.parametrize("resident", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 5))])
def test_moved_bytes_are_those_of_the_trace(resident):
  config, _, _ = make("windowed")
  served = engine("windowed", resident, slots=1)
  [made] = responses(served, [Request(prompt(1), 40)])  # a token at a time, the prompt's too
  [wanted] = responses(engine("windowed", slots=1), [Request(prompt(1), 40)])
  assert [token.token for token in made] == [token.token for token in wanted]
  choice = choices([*prompt(1), *(token.token for token in made[:-1])])
  misses_Z = lru_misses(choice.expert_TK, choice.valid_TK, resident)
  np.testing.assert_array_equal(served.offloaded.residents.fetched_Z, misses_Z)
  model = config.model
  assert served.offloaded.expert_bytes == 3 * model.dim * model.expert_dim * 4
  assert served.offloaded.moved_bytes == misses_Z.sum() * served.offloaded.expert_bytes
  assert served.offloaded.pool_bytes == (2 * resident + config.routing.slots) * served.offloaded.expert_bytes
  assert served.offloaded._experts_ZE[0][0].gate_EDF.sharding.memory_kind == "pinned_host"
  assert (resident == 5) == (misses_Z.max() <= 5)  # with room for all each comes once


@pytest.mark.slow
def test_a_chunk_and_sequences_together_share_what_they_fetch():
  served = engine("windowed", (2, 1), slots=2)
  both = [Request(prompt(20), 5), Request(prompt(20, 1), 5)]
  made = responses(served, both)
  # Read together, row by row: a chunk of 16 and one of 4; then a token of each a step.
  expert_ZTK, valid_ZTK = [], []
  for request, tokens in zip(both, made, strict=True):
    choice = choices([*request.prompt, *(token.token for token in tokens[:-1])])
    expert_ZTK.append(choice.expert_TK)
    valid_ZTK.append(choice.valid_TK)
  step_T = np.repeat([0, 1, 2, 3, 4, 5], [16, 4, 1, 1, 1, 1])
  order = np.lexsort((np.tile(np.arange(24), 2), np.repeat([0, 1], 24), np.tile(step_T, 2)))
  experts, valid = (np.concatenate(parts, axis=1)[:, order] for parts in (expert_ZTK, valid_ZTK))
  misses_Z = lru_misses(experts, valid, (2, 1), np.tile(step_T, 2)[order])
  np.testing.assert_array_equal(served.offloaded.residents.fetched_Z, misses_Z)


@pytest.mark.slow
def test_four_bits_as_the_plan_has_them():
  state, config = begun(), adapted(weights="nf4")
  params = quantised(state.params, "nf4")
  room = plan(config, 10**10, 64, sequences=1, chunk=16, reserve=0)
  memory = room.fixed + config.routing.slots * room.expert + 3 * room.expert
  made = plan(config, memory, 64, sequences=1, chunk=16, reserve=0)
  settings = dict(slots=1, capacity=64, chunk=16, steps=4)
  host = jax.tree.map(np.asarray, params)  # as one does with a model that is larger than the device
  served = Engine(config, host, state.router_state, resident_experts=made.resident_ZE.sum(1), **settings)
  assert served.offloaded.expert_bytes == made.expert
  assert served.offloaded.pool_bytes == made.staging + int(made.resident_ZE.sum()) * made.expert
  request = Request([1, 2, 3], 20)
  [wanted], [got] = (
    responses(one, [request]) for one in (Engine(config, params, state.router_state, **settings), served)
  )
  assert [t.token for t in got] == [t.token for t in wanted] and served.offloaded.moved_bytes > 0


@pytest.mark.slow
def test_steady_mode_too():
  requests = [Request(prompt(n, n), 8, budget=b) for n, b in ((20, 4.0), (3, 1.0))]
  theirs, ours = (responses(engine("windowed", n, steady=True), requests) for n in (None, 1))
  assert [[t.token for t in made] for made in ours] == [[t.token for t in made] for made in theirs]
  assert [[t.experts for t in made] for made in ours] == [[t.experts for t in made] for made in theirs]


def test_what_cannot_be_offloaded():
  for resident in (-1, 6, (1, 6)):
    with pytest.raises(UserError, match="resident_experts=.*from 0 to 5"):
      engine("windowed", resident)
  config, params, _ = make("topk_rotary_dense")
  dense = dataclasses.replace(config, model=dataclasses.replace(config.model, num_dense_layers=2))
  with pytest.raises(ConfigError, match="num_dense_layers"):
    Offloaded(dense, params, 1)
  with pytest.raises(ConfigError, match="lora_rank"):
    Offloaded(dataclasses.replace(config, adapt=AdaptConfig(lora_rank=2)), params, 1)
