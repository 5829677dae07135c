"""What an export of a model of our own consists of: the names of its tensors, its config.json, its PyTorch file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError
from moe_lab.interop.tensors import STACKS, Row

MODELING = Path(__file__).with_name("modeling_moe_lab.py")  # transformers loads a copy of it
MODEL_TYPE = "moe_lab"
_METHODS = ("dynamic", "topk")  # that the PyTorch file knows


def rows(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Row, ...]:
  """Returns the format: our own names and shapes, a layer at a time."""
  found = {}
  for path, shape in shapes.items():
    stack, _, rest = path.partition("/")
    stacked = stack in STACKS
    axes = " ".join("abcdefg"[: len(shape) - stacked])
    name, place = (f"layers.{{z}}.{rest}", f"layers/{rest}") if stacked else (path, path)
    found[place] = Row(name.replace("/", "."), place, f"{axes} -> {axes}")
  return tuple(found.values())


def with_routing(params: Mapping[str, np.ndarray], bias_ZE, threshold_ZJ, config: Config) -> dict[str, np.ndarray]:
  """Returns the parameters, by path, with what routing knows besides them at inference.

  Args:
    params: by path.
    bias_ZE: of the choice of experts.
    threshold_ZJ: what the inference rule of a learned count goes by; anything for other methods.
    config: of the model.
  """
  found = dict(params)
  if config.model.num_dense_layers < config.model.num_layers:
    found[f"{STACKS[1]}/moe/bias_E"] = np.asarray(bias_ZE, np.float32)
    if config.routing.learns_counts:
      found[f"{STACKS[1]}/moe/threshold_J"] = np.asarray(threshold_ZJ, np.float32)
  return found


def to_raw(config: Config, params: Mapping[str, np.ndarray], budget: float) -> dict:
  """Returns the config.json.

  Args:
    config: of the model.
    params: by path.
    budget: mean experts that are asked for unless the caller says otherwise.

  Raises:
    ConfigError: the PyTorch file does not know the routing method.
  """
  routing = config.routing
  if routing.method not in _METHODS:
    raise ConfigError("routing.method", routing.method, f"one of {', '.join(_METHODS)}, to be exported")
  decided = {"gate": routing.slot_gate, "standardise": routing.standardised}  # what `auto` came to
  policy_bias = params.get(f"{STACKS[1]}/moe/policy_bias")
  width = {} if policy_bias is None else {"policy_width": policy_bias.shape[-1]}
  return {
    "model_type": MODEL_TYPE,
    "architectures": ["MoeLabForCausalLM"],
    "auto_map": {
      "AutoConfig": f"{MODELING.stem}.MoeLabConfig",
      "AutoModelForCausalLM": f"{MODELING.stem}.MoeLabForCausalLM",
    },
    "vocab_size": config.data.vocab_size,
    "max_position_embeddings": config.data.seq_len,
    "shapes": dataclasses.asdict(config.model),
    "routing": dataclasses.asdict(routing) | decided | width,
    "budget": budget,
    "tie_word_embeddings": False,  # the file ties them itself
  }
