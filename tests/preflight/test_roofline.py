"""The roofline's parts by hand."""

import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from moe_lab.errors import UserError
from moe_lab.preflight.chips import Chip, chip_of
from moe_lab.preflight.compile import Compiled
from moe_lab.preflight.hlo import Collective
from moe_lab.preflight.roofline import mean_context, roofline


def test_a_chip_is_known_by_its_topology():
  assert chip_of("v5p:4x4x8").memory_bytes == 95 * 2**30
  with pytest.raises(UserError, match="--topology=v5q:2x2: wanted a chip of v4, v5e, v5p, v6e.*did you mean"):
    chip_of("v5q:2x2")


def test_the_mean_context_is_that_of_positions_and_windows():
  rotary = Config(ModelConfig(position="rotary"), data=DataConfig(seq_len=4))
  assert mean_context(rotary) == pytest.approx((1 + 2 + 3 + 4) / 4)
  sloped = Config(data=DataConfig(seq_len=100_000))
  assert mean_context(sloped) < mean_context(Config(ModelConfig(position="rotary"), data=sloped.data))


def test_the_step_takes_as_long_as_the_longest_part():
  config = Config(train=TrainConfig(batch_size=8))
  gathers = [Collective("all-gather", ("fsdp",), 2, 2_000, 3)]
  compiled = Compiled(400, 800, 0, 0, gathers, 1.0)
  bound = roofline(config, compiled, Chip(1, 1e8, 1e3, 1e3), 4)
  # float32: 400 bytes of weights forward and twice backward; parameters, gradients and moments read and written.
  assert bound.memory == pytest.approx((3 * 400 + 2 * (2 * 400 + 800)) / 1e3)
  assert bound.network == pytest.approx(3 * 1_000 / 1e3)
  assert bound.compute == pytest.approx(bound.flops_per_token * 8 * config.data.seq_len / 4 / 1e8)
  assert bound.seconds == bound.compute and bound.binds == "compute" and bound.share == 1
