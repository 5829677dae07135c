"""Carbon, price and FLOPs of responses, by hand."""

import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.evaluate import cost


def test_carbon():
  # 36 kJ are a hundredth of a kWh, of which 400 g each make 4 g.
  assert cost.grams_of_co2(36_000, 400) == pytest.approx(4.0)
  assert cost.grams_of_co2(36_000, 0) == 0


def test_above_idle():
  assert cost.joules_above_idle(500, seconds=4, idle_watts=100) == pytest.approx(100)
  assert cost.joules_above_idle(390, seconds=4, idle_watts=100) == pytest.approx(-10)  # told as it is


def test_price():
  # A million tokens at 1,000 a second take 1,000 s, 0.2778 h; at 3.60 an hour they cost 1.
  assert cost.device_hours_per_million_tokens(1_000) == pytest.approx(1 / 3.6)
  assert cost.price_per_million_tokens(3.6, 1_000) == pytest.approx(1.0)
  assert cost.price_per_million_tokens(3.6, 250) == pytest.approx(4.0)


def test_flops():
  model = ModelConfig(
    dim=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, num_experts=4, expert_dim=3, position="rotary",
    num_global_groups=0,
  )  # fmt: skip
  config = Config(model, RoutingConfig(method="topk", standardise=False), DataConfig(vocab_size=10))
  # A token: projections 2*4*(2+2)*2 = 64; scores 4*2 = 8 a key; router 2*4*4 = 32; an expert 6*4*3 = 72; head 80.
  # The five of a response follow 3 to 7 tokens, 5 on average.
  assert cost.generated_token_flops(config, prompt=3, new=5, experts=2.0) == 64 + 8 * 5 + 32 + 72 * 2 + 80
  # The prompt's three see 2 keys on average, with one expert each, and one head; four steps then see 4 to 7 keys.
  read = 3 * (64 + 8 * 2 + 32 + 72) + 80
  steps = 4 * (64 + 8 * 5.5 + 32 + 72 * 2 + 80)
  assert cost.response_flops(config, prompt=3, new=5, prompt_experts=1.0, experts=2.0) == read + steps
