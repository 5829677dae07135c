"""Meshes by arithmetic: which are legal, and that the order is that of the compiled programs."""

import dataclasses

import pytest

from moe_lab.adapt.tensors import part_of, tensors
from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.mesh import MeshConfig
from moe_lab.errors import UserError
from moe_lab.nn.weights import FAMILY
from moe_lab.preflight.chips import CHIPS
from moe_lab.preflight.estimate import estimate, weights_of
from moe_lab.preflight.search import MARGIN, candidates, legal_meshes, rank, search
from moe_lab.train.state import abstract_plain_params, abstract_state
from tests.preflight.test_report import CONFIG


def test_legal_meshes_divide_what_they_spread():
  found = legal_meshes(CONFIG, 8)
  assert MeshConfig(fsdp=2, expert=4) in found and MeshConfig(fsdp=8) in found
  for mesh in found:
    assert CONFIG.model.num_experts % mesh.expert == 0 and CONFIG.model.num_kv_heads % mesh.model == 0
    assert 8 % (mesh.fsdp * mesh.expert * mesh.sequence * mesh.model) == 0
  assert not any(mesh.expert == 8 for mesh in found)  # of four experts


def test_sharing_saves_memory_and_costs_network():
  weights, chip = weights_of(CONFIG), CHIPS["v5e"]
  apart = estimate(CONFIG, weights, MeshConfig().sizes(4), chip)
  shared = estimate(CONFIG, weights, MeshConfig(fsdp=4).sizes(4), chip)
  assert shared.bytes_per_chip < apart.bytes_per_chip
  assert shared.roofline.compute == apart.roofline.compute


def test_only_what_learns_has_gradients_and_moments():
  chip, sizes = CHIPS["v5e"], MeshConfig(fsdp=2, expert=2).sizes(4)
  trained = estimate(CONFIG, weights_of(CONFIG), sizes, chip)
  lora = dataclasses.replace(CONFIG, adapt=AdaptConfig(lora_rank=4, router="frozen"))
  weights = weights_of(lora)
  adapted = estimate(lora, weights, sizes, chip)
  in_adapters = sum(w.size for w in weights if w.learns)
  assert in_adapters == sum(
    leaf.size for path, leaf in tensors(abstract_state(lora).params).items() if part_of(path[-1])
  )
  parts = [sum(w.part(sizes) for w in group) for group in (weights_of(CONFIG), [w for w in weights if w.learns])]
  # Moments and gradients: 12 bytes of each number that learns. Its value, 4 bytes, and that the backward pass of a
  # layer has its experts' adapters at hand too, come on top.
  at_hand = 2 * 4 * sum(w.part(sizes, "fsdp") for w in weights if w.learns and w.of_experts) / CONFIG.model.num_layers
  saved = 12 * parts[0] - 16 * parts[1] - at_hand
  assert trained.bytes_per_chip - adapted.bytes_per_chip == pytest.approx(saved)
  assert adapted.roofline.network < trained.roofline.network
  assert adapted.roofline.compute == pytest.approx(trained.roofline.compute * 2 / 3)


def test_weights_in_4_bits_are_held_as_they_are():
  chip, sizes = CHIPS["v5e"], MeshConfig(fsdp=4).sizes(4)
  config = dataclasses.replace(CONFIG, adapt=AdaptConfig(weights="nf4", lora_rank=4))
  weights = weights_of(config)
  coded = sum(w.size for w in weights if w.itemsize == 1)
  in_4_bits = sum(tensor.size for path, tensor in tensors(abstract_plain_params(config)).items() if path[-1] in FAMILY)
  assert 8 * coded == 4.5 * in_4_bits and not any(w.learns for w in weights if w.itemsize == 1)
  plain = dataclasses.replace(config, adapt=AdaptConfig(lora_rank=4))
  gap = (
    estimate(plain, weights_of(plain), sizes, chip).bytes_per_chip
    - estimate(config, weights, sizes, chip).bytes_per_chip
  )
  assert gap > (4 - 4.5 / 8) * in_4_bits / 4  # and a layer's experts, gathered


def test_those_that_fit_come_first():
  small = dataclasses.replace(CHIPS["v5e"], memory_bytes=estimate_of(MeshConfig(fsdp=8)) * 1.1 * MARGIN)
  ranked = candidates(CONFIG, small, 8)
  fit = [MARGIN * one.estimate.bytes_per_chip <= small.memory_bytes for one in ranked]
  assert any(fit) and fit == sorted(fit, reverse=True)
  assert rank(True, 2.0, 1.0, 5) < rank(True, 2.0, 1.5, 1) < rank(False, 1.0, 1.0, 1) < rank(False, None, None, 1)


def estimate_of(mesh):
  return estimate(CONFIG, weights_of(CONFIG), mesh.sizes(8), CHIPS["v5e"]).bytes_per_chip


def test_no_mesh_is_said_in_a_line():
  with pytest.raises(UserError, match="no mesh of 7 chips divides the model"):
    candidates(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=1)), CHIPS["v5e"], 7)


@pytest.mark.slow
def test_the_best_is_compiled():
  pytest.importorskip("libtpu")
  said = []
  result = search(CONFIG, "v5e:2x2", said.append)
  compiled = result["search"]["compiled"]
  assert result["fits"] and len(compiled) == min(3, result["search"]["legal"])
  assert result["suggestion"] == compiled[0]["flags"]
  assert [one["step_seconds"] for one in compiled] == sorted(one["step_seconds"] for one in compiled)
