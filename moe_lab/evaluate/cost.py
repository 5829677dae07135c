"""What responses cost, by arithmetic: FLOPs, carbon, price. Currencies are that of the price that is given."""

from moe_lab.config.schema import Config
from moe_lab.evaluate.flops import forward_flops_per_token

JOULES_PER_KWH = 3.6e6


def grams_of_co2(joules: float, grid_g_per_kwh: float) -> float:
  """Returns grams of CO2 equivalent; `grid_g_per_kwh`: what the grid emits for a kilowatt-hour."""
  return joules / JOULES_PER_KWH * grid_g_per_kwh


def joules_above_idle(joules: float, seconds: float, idle_watts: float) -> float:
  """Returns what was spent beyond what the machine at rest takes in that time; below 0 within the noise."""
  return joules - seconds * idle_watts


def device_hours_per_million_tokens(tokens_per_second: float) -> float:
  """Returns for how long one device is busy with a million tokens."""
  return 1e6 / tokens_per_second / 3600


def price_per_million_tokens(price_per_device_hour: float, tokens_per_second: float) -> float:
  """Returns the price of a million generated tokens, the reading of their prompts included, at that throughput."""
  return price_per_device_hour * device_hours_per_million_tokens(tokens_per_second)


def generated_token_flops(config: Config, prompt: int, new: int, experts: float) -> float:
  """Returns the FLOPs of one generated token, the mean over a response.

  Args:
    config: shapes.
    prompt: tokens of the prompt.
    new: tokens of the response.
    experts: mean experts per generated token and layer.
  """
  # It is computed from the prompt and the tokens before it; where windows are shorter than that this is too much.
  return forward_flops_per_token(config, experts, prompt + (new - 1) / 2)["total"]


def response_flops(config: Config, prompt: int, new: int, prompt_experts: float, experts: float) -> float:
  """Returns the FLOPs of reading a prompt and generating a response; arguments as in `generated_token_flops`.

  The first token comes of the prompt, and the last one is not computed on: new - 1 steps. Of the prompt only the last
  token goes through the head.
  """
  read = forward_flops_per_token(config, prompt_experts, (prompt + 1) / 2)
  steps = (new - 1) * forward_flops_per_token(config, experts, prompt + new / 2)["total"]
  return prompt * (read["total"] - read["head"]) + read["head"] + steps
