"""The routing methods by name."""

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.dynamic import Dynamic
from moe_lab.routing.null_experts import NullExperts
from moe_lab.routing.random_k import RandomK
from moe_lab.routing.router import Router
from moe_lab.routing.top_p import TopP, TopPSteered
from moe_lab.routing.topk import TopK

METHODS = {
  "dynamic": Dynamic,
  "topk": TopK,
  "random_k": RandomK,
  "top_p": TopP,
  "top_p_pi": TopPSteered,
  "null_experts": NullExperts,
}


def make_router(config: RoutingConfig) -> Router:
  """Returns the router of `config.method`."""
  return METHODS[config.method](config)
