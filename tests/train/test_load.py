"""Trained models from a run's folder: onto the device, or into host memory for experts that are fetched."""

import gc

import jax
import numpy as np
import pytest

from moe_lab.infer.request import Request
from moe_lab.train.load import load_text_model
from tests.evaluate.random_run import random_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return random_run(tmp_path_factory.mktemp("load") / "run", tmp_path_factory.mktemp("cache"))


def on_device():
  """Returns the arrays that take memory of the device, by identity."""
  gc.collect()
  kind = jax.devices()[0].default_memory().kind
  return {id(array): array for array in jax.live_arrays() if array.sharding.memory_kind == kind}


def test_of_offloaded_experts_only_the_residents_are_ever_on_the_device(run):
  before = on_device()
  model = load_text_model(run, in_host=True)
  params, state = model.loaded.params, model.loaded.router_state
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
  added = [array for key, array in on_device().items() if key not in before]
  assert sorted(map(id, added)) == sorted(map(id, jax.tree.leaves(state)))
  engine = model.engine(slots=1, capacity=64, resident_experts=1)
  added = [array for key, array in on_device().items() if key not in before]
  offloaded, config = engine.offloaded, model.loaded.config
  one = 3 * config.model.dim * config.model.expert_dim * 4
  experts = config.model.num_layers * config.model.num_experts * one
  assert offloaded.pool_bytes == (config.model.num_layers + config.routing.slots) * one < experts
  rest = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - experts
  others = sum(leaf.nbytes for leaf in jax.tree.leaves((state, engine._cache, engine._slots)))
  assert sum(array.nbytes for array in added) == rest + offloaded.pool_bytes + others


@pytest.mark.slow
def test_from_host_memory_it_writes_the_same(run):
  texts = []
  for in_host, resident in ((False, None), (True, 2)):
    model = load_text_model(run, in_host=in_host)
    engine = model.engine(slots=1, capacity=64, resident_experts=resident)
    request = Request(model.tokens("def main("), 20, temperature=0)
    texts.append([token.token for _, token in engine.generate([request])])
  assert texts[0] == texts[1]
