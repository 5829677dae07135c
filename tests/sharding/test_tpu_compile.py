"""What XLA makes of the training step for TPUs, compiled ahead of time."""

import dataclasses

import pytest

from benchmarks.tpu_compile import CONFIG, MESHES, TOPOLOGIES, compile_for, topology_mesh
from moe_lab.config.mesh import MeshConfig
from moe_lab.preflight.compile import compile_train_step
from moe_lab.preflight.report import preflight


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_four_chips_exchange_rows_and_not_weights(topology):
  pytest.importorskip("libtpu")
  result = compile_for(topology, CONFIG, MESHES[1])
  assert not result["gathers_all_experts"]
  assert "ragged-all-to-all" in [c["opcode"] for c in result["collectives"]]


@pytest.mark.slow
def test_weights_of_experts_are_gathered_along_fsdp_only():
  pytest.importorskip("libtpu")
  model = CONFIG.model
  found = compile_train_step(CONFIG, topology_mesh("v5e:2x4", MeshConfig(data=1, fsdp=2, expert=4))).collectives
  # Rows there and back, forward and for the gradients at least, in each layer.
  rows = [c for c in found if c.opcode == "ragged-all-to-all"]
  assert {c.axes for c in rows} == {("expert",)} and sum(c.times for c in rows) >= 4 * model.num_layers
  gathers = [c for c in found if c.opcode == "all-gather"]
  matrix = model.dim * model.expert_dim * 2  # bytes of one expert's, in bfloat16
  fetched = [c for c in gathers if c.axes == ("fsdp",) and c.result_bytes >= model.num_experts // 4 * matrix]
  assert sum(c.times for c in fetched) >= model.num_layers
  # What else is gathered (once the gradient of the embeddings) is less than one of the experts' three matrices.
  others = sum(c.result_bytes * c.times for c in gathers if c.axes != ("fsdp",))
  assert others < model.num_layers * model.num_experts * matrix / 2


@pytest.mark.slow
def test_only_copies_of_the_model_talk_between_slices():
  pytest.importorskip("libtpu")
  mesh = MeshConfig(data=2, fsdp=2, expert=2, slices=2)
  result = preflight(dataclasses.replace(CONFIG, mesh=mesh), "v5e:2x2")
  assert result["chips"] == 8 and result["fits"]
  sent = result["collective_bytes"]
  assert {name for name in sent if "data" in name} <= {
    f"all-{what} between slices over data" for what in ("reduce", "gather")
  }
  assert sent.get("all-gather between slices over data", 0) < 0.05 * sent["all-reduce between slices over data"]
  # All gradients, at least in bfloat16, twice half of them: a ring of two.
  assert sent["all-reduce between slices over data"] >= result["parameter_bytes"] / 2
  # 3.1 GB/s between slices, 200 within.
  assert result["network_seconds"] > sent["all-reduce between slices over data"] / 3.2e9
