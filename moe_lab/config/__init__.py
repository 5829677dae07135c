"""The configuration of a run: schema, resolution, and the entry that the programs share."""

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.resolve import base_config, diff, from_dict, from_json, resolve, to_json
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig

__all__ = [
  "AdaptConfig",
  "Config",
  "DataConfig",
  "MeshConfig",
  "ModelConfig",
  "RoutingConfig",
  "TrainConfig",
  "base_config",
  "diff",
  "from_dict",
  "from_json",
  "resolve",
  "to_json",
]
