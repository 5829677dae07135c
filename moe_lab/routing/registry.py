"""The routing methods by name."""

from moe_lab.config.schema import RoutingConfig
from moe_lab.routing.curvature import CurvatureValued
from moe_lab.routing.dynamic import Dynamic
from moe_lab.routing.entropy_rule import EntropyRule
from moe_lab.routing.expert_choice import ExpertChoice
from moe_lab.routing.expert_threshold import ExpertThreshold
from moe_lab.routing.learned_threshold import LearnedThreshold
from moe_lab.routing.null_experts import NullExperts
from moe_lab.routing.random_k import RandomK
from moe_lab.routing.relu import ReLU
from moe_lab.routing.router import Router
from moe_lab.routing.sequence_topk import SequenceTopK
from moe_lab.routing.top_p import TopP, TopPSteered
from moe_lab.routing.topk import TopK

METHODS = {
  "dynamic": Dynamic,
  "topk": TopK,
  "random_k": RandomK,
  "top_p": TopP,
  "top_p_pi": TopPSteered,
  "null_experts": NullExperts,
  "learned_threshold": LearnedThreshold,
  "relu": ReLU,
  "expert_threshold": ExpertThreshold,
  "entropy_rule": EntropyRule,
  "expert_choice": ExpertChoice,
  "sequence_topk": SequenceTopK,
}


def make_router(config: RoutingConfig) -> Router:
  """Returns the router of `config.method`."""
  if config.learns_counts and config.learner == "curvature":
    return CurvatureValued(config)
  return METHODS[config.method](config)
