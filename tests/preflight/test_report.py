"""What a preflight says, and that the compiler for TPU is asked only for what exists."""

import dataclasses

import pytest

from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.errors import ConfigError, UserError
from moe_lab.preflight.report import preflight, table

CONFIG = Config(
  model=ModelConfig(dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=4, expert_dim=256),
  routing=RoutingConfig(k_max=4),
  data=DataConfig(vocab_size=1024, seq_len=256),
  train=TrainConfig(batch_size=8),
  mesh=MeshConfig(fsdp=2, expert=2),
)


@pytest.mark.slow
def test_a_small_model_for_four_chips():
  pytest.importorskip("libtpu")
  result = preflight(CONFIG, "v5e:2x2")
  assert result["fits"] and result["chips"] == 4 and result["bytes_per_chip"] < result["chip_bytes"]
  # A quarter of the experts' weights, half of the others', in float32; two moments.
  assert result["params_total"] < result["parameter_bytes"] < 2 * result["params_total"]
  assert result["optimizer_bytes"] == pytest.approx(2 * result["parameter_bytes"], rel=0.01)
  sent = result["collective_bytes"]
  assert sent["ragged-all-to-all over expert"] > 0 and sent["all-gather over fsdp"] > 0
  assert not any(
    name.startswith("all-gather over") and name.endswith("over expert") for name in sent if sent[name] > 1e6
  )
  assert "4 chips: fsdp 2 x expert 2" in table(result)


def test_what_does_not_exist_is_refused_in_a_line():
  with pytest.raises(UserError, match="--topology=h100:8: wanted a chip of v4"):
    preflight(CONFIG, "h100:8")
  pytest.importorskip("libtpu")
  with pytest.raises(UserError, match="--topology=v5e:2x3x7: wanted one as TPUs are sold"):
    preflight(CONFIG, "v5e:2x3x7")
  with pytest.raises(ConfigError, match="mesh = .*= 8.*: wanted a divisor of the number of devices, 4"):
    preflight(dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2, expert=4)), "v5e:2x2")
