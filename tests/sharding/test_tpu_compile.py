"""What XLA makes of the training step for TPUs, compiled ahead of time."""

import pytest

from benchmarks.tpu_compile import CONFIG, TOPOLOGIES, compile_for


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_four_chips_exchange_rows_and_not_weights(topology):
  pytest.importorskip("libtpu")
  result = compile_for(topology, CONFIG, (1, 4))
  assert not result["gathers_all_experts"]
  assert "ragged-all-to-all" in [c["opcode"] for c in result["collectives"]]
