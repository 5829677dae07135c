"""What a preflight says, and that the compiler for TPU is asked only for what exists."""

import dataclasses

import pytest

from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.errors import ConfigError, UserError
from moe_lab.preflight.compile import bytes_used
from moe_lab.preflight.report import preflight, table
from moe_lab.preflight.serving import Serving

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


def test_the_compilers_complaints_say_how_much_is_missing():
  said = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.25G of 15.48G hbm. Exceeded hbm capacity by"
  )
  assert bytes_used(said, 2**30) == 31.25 * 2**30
  said = "the total memory required for HLO temporaries (118.50G) exceeds available HBM (15.75G)."
  assert bytes_used(said, 2**30) == 119.5 * 2**30
  assert bytes_used("INTERNAL: something else", 1) is None


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much():
  pytest.importorskip("libtpu")
  result = preflight(dataclasses.replace(CONFIG, train=TrainConfig(batch_size=8192)), "v5e:2x2")
  assert not result["fits"] and result["bytes_per_chip"] > result["chip_bytes"]
  assert result["step_seconds"] is None and result["collective_bytes"] is None
  assert "does not fit" in table(result) and "GiB too much" in table(result) and "not known" in table(result)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_the_engines_programs_for_four_chips(program):
  pytest.importorskip("libtpu")
  config = dataclasses.replace(
    CONFIG, mesh=MeshConfig(expert=2, model=2), model=dataclasses.replace(CONFIG.model, dtype="bfloat16", head_dim=128)
  )
  result = preflight(config, "v5e:2x2", Serving(program, 16, 1024, 128))
  assert result["program"] == program and result["fits"] and result["optimizer_bytes"] == 0
  assert result["tokens_per_step"] == {"decode": 16, "prefill": 4 * 128}[program]
  # Half of the sequences on each half of the chips, and of each one of two KV groups: 2 layers of keys and values.
  assert result["cache_bytes"] == 2 * 2 * 8 * 1024 * 128 * 2
  sent = result["collective_bytes"]
  assert sent["ragged-all-to-all over expert"] > 0 and sent["all-reduce over model"] > 0
  # Weights stay where they are: nothing of an expert's size is gathered.
  assert sum(sent[name] for name in sent if name.startswith("all-gather")) < result["parameter_bytes"]


def test_slots_that_the_mesh_does_not_divide_are_refused():
  pytest.importorskip("libtpu")
  with pytest.raises(UserError, match="slots=3: wanted a multiple of 4"):
    preflight(CONFIG, "v5e:2x2", Serving("decode", 3, 1024, 128))
