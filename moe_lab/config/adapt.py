"""What was made of a trained model's weights, and what of them goes on learning."""

import dataclasses

from moe_lab.config.checks import check_choice, check_range
from moe_lab.errors import ConfigError

ADAPTED = ("attention", "mlp", "experts")  # families of weights: mlp is that of dense layers and of shared experts


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
  """Set by `experiments/adapt.py`; the defaults are those of a model that is trained from the start."""

  # Of experts and projections: float32 | int4 | nf4 (arXiv 2305.14314). What is in 4 bits does not learn.
  weights: str = "float32"
  # Rank of the adapters (LoRA, arXiv 2106.09685), which then alone learn; 0: none. An expert's is divided by the mean
  # number of a token's experts, so that a token meets as many adapter weights there as in a projection.
  lora_rank: int = 0
  lora_on: tuple[str, ...] = ADAPTED  # which weights have one
  # All weights and the router: trained | frozen (nothing but the count policy and its value head learns).
  trunk: str = "trained"
  # The router and its count policy: trained | frozen, with its controllers | held (trained, and kept near the choice of
  # the model that it began as: a loss of the two routers' Kullback-Leibler divergence).
  router: str = "trained"
  router_kl_weight: float = 1.0  # held: of that loss, in nats a token and layer

  def __post_init__(self):
    check_choice("adapt.weights", self.weights, ("float32", "int4", "nf4"))
    check_range("adapt.lora_rank", self.lora_rank, 0)
    if not self.lora_on:
      raise ConfigError("adapt.lora_on", self.lora_on, f"some of {', '.join(ADAPTED)}")
    for family in self.lora_on:
      check_choice("adapt.lora_on", family, ADAPTED)
    check_choice("adapt.trunk", self.trunk, ("trained", "frozen"))
    if self.trunk == "frozen" and self.lora_rank:
      raise ConfigError("adapt.lora_rank", self.lora_rank, "0, since adapt.trunk is frozen")
    if self.trunk == "frozen" and self.router != "trained":
      raise ConfigError("adapt.router", self.router, "trained, since adapt.trunk is frozen and leaves the policy alone")
    check_choice("adapt.router", self.router, ("trained", "frozen", "held"))
    check_range("adapt.router_kl_weight", self.router_kl_weight, 0)

  @property
  def learns(self) -> str:
    """Which weights learn: all | adapters | nothing, but for the router's; or policy: nothing but the count policy."""
    if self.trunk == "frozen":
      return "policy"
    if self.lora_rank:
      return "adapters"
    return "all" if self.weights == "float32" else "nothing"
