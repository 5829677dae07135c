"""The routing methods by name."""

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.dynamic import Dynamic
from moe_lab.routing.router import Router
from moe_lab.routing.topk import TopK

METHODS = {"dynamic": Dynamic, "topk": TopK}


def make_router(config: RoutingConfig) -> Router:
  """Returns the router of `config.method`."""
  return METHODS[config.method](config)
