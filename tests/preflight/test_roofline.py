"""The roofline's parts by hand."""

import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from moe_lab.errors import UserError
from moe_lab.preflight.chips import Chip, chip_of
from moe_lab.preflight.compile import Compiled
from moe_lab.preflight.hlo import Collective
from moe_lab.preflight.roofline import mean_context, network_seconds, roofline, serving_roofline
from moe_lab.preflight.serving import Serving


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
  bound = roofline(config, compiled, Chip(1, 1e8, 1e3, 1e3, 1e2), 4)
  # float32: 400 bytes of weights forward and twice backward; parameters, gradients and moments read and written.
  assert bound.memory == pytest.approx((3 * 400 + 2 * (2 * 400 + 800)) / 1e3)
  assert bound.network == pytest.approx(3 * 1_000 / 1e3)
  assert bound.compute == pytest.approx(bound.flops_per_token * 8 * config.data.seq_len / 4 / 1e8)
  assert bound.seconds == bound.compute and bound.binds == "compute" and bound.share == 1


def test_between_slices_it_takes_the_hosts_network():
  within = Collective("all-reduce", ("data",), 2, 1_000, 1)
  between = Collective("all-reduce between slices", ("data",), 2, 1_000, 1)
  assert network_seconds(Config(), [within, between], Chip(1, 1, 1, 1e3, 1e2)) == pytest.approx(1 + 10)


def test_decoding_reads_the_experts_that_are_taken_and_its_sequences_cache():
  config = Config(ModelConfig(position="rotary", num_experts=16))  # two of 16 experts on average
  compiled = Compiled(1_000, 0, 0, 0, [], 1.0, expert_bytes=800, cache_bytes=4_000)
  chip = Chip(1, 1e8, 1e3, 1e3, 1e2)
  decode = serving_roofline(config, compiled, Serving("decode", 8, 100, 16), chip, 2)
  assert decode.memory == pytest.approx((200 + 800 * (1 - (14 / 16) ** 8) + 4_000) / 1e3)
  assert decode.compute == pytest.approx(8 * decode.flops_per_token / 2 / 1e8)
  prefill = serving_roofline(config, compiled, Serving("prefill", 8, 100, 16), chip, 2)
  assert prefill.memory == pytest.approx((200 + 800 * (1 - (14 / 16) ** 64) + 2_000) / 1e3)
  assert prefill.compute == pytest.approx(64 * prefill.flops_per_token / 2 / 1e8)
  # A chunk's logits are those of its last tokens: one of 16.
  head = 2 * config.model.dim * config.data.vocab_size
  assert decode.flops_per_token - prefill.flops_per_token == pytest.approx(head * 15 / 16)
