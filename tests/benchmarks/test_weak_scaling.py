"""The weak-scaling report: what a chip sends by axis, the table and the drawings."""

import pytest

from benchmarks import weak_scaling
from benchmarks.machine import describe
from moe_lab.config.mesh import MeshConfig


def result(chips, fsdp):
  sent = {"all-gather over fsdp": 3e9, "reduce-scatter over fsdp": 1e9, "ragged-all-to-all over expert": 2e9}
  return {
    "topology": weak_scaling.TOPOLOGIES[chips], "chips": chips, "mesh": {"fsdp": fsdp, "expert": 4}, "fits": True,
    "bytes_per_chip": 60 * 2**30, "chip_bytes": 95 * 2**30, "network_seconds": 0.2, "compute_seconds": 0.9,
    "step_seconds": 0.9, "roofline_share": 0.75, "sent_by_axis": weak_scaling.by_axis(sent),
  }  # fmt: skip


def test_bytes_are_added_by_axis():
  assert result(16, 4)["sent_by_axis"] == {"fsdp": 4e9, "expert": 2e9}


@pytest.mark.parametrize("chips, topology", weak_scaling.TOPOLOGIES.items())
def test_topologies_have_so_many_chips_and_meshes(chips, topology):
  a, b, c = (int(n) for n in topology.partition(":")[2].split("x"))
  assert a * b * c == chips
  assert MeshConfig(fsdp=chips // weak_scaling.EXPERT, expert=weak_scaling.EXPERT).sizes(chips)["data"] == 1


def test_the_report_has_a_row_and_a_point_for_each(tmp_path):
  found = [result(16, 4), result(32, 8), {"chips": 64, "topology": "v5p:4x4x4", "error": "no luck", "sent_by_axis": {}}]
  path = weak_scaling.save(tmp_path, found, describe(), "the command")
  text, drawn = path.read_text(), path.with_suffix(".html").read_text()
  rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in text.splitlines()]
  assert ["32", "v5p:2x4x4", "8 x 4"] in rows and ["64", "v5p:4x4x4", "no luck"] in rows
  assert "4.00 GB" in text and "6.0 GB" in text
  assert drawn.count("<svg") >= 2 and "16 chips: 4.0 GB" in drawn and "32 chips: 75.0 %" in drawn
