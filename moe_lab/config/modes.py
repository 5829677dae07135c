"""What each mode of `experiments/adapt.py` makes of a trained run's configuration; whatever does not go is one line."""

import dataclasses
from pathlib import Path

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.resolve import diff
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError

MODES = ("quantise", "lora", "merge", "finetune")
DEFAULT_RANK, DEFAULT_BOOK = 8, "nf4"
# Fields of model and routing that may differ from the base's: how it is computed, and how it is trained.
_MAY_DIFFER = {
  *(f"model.{name}" for name in ("dtype", "dispatch", "grouped_matmul", "capacity_factor", "remat")),
  *(f"model.{name}" for name in ("attention_backend", "attention_block", "position_interpolation", "sharpen_from")),
  *(f"routing.{name}" for name in ("budget", "budget_mode", "warmup_steps", "entropy_floor", "credit_discount")),
  *(f"routing.{name}" for name in ("load_balance_weight", "balance_scope", "z_loss_weight", "entropy_loss_weight")),
  *(f"routing.{name}" for name in ("bias_update_rate", "router_jitter", "gating_dropout", "expert_dropout")),
}


def adapted(mode: str, base: Config, config: Config, folder: Path, adapter: str | None = None) -> Config:
  """Returns the configuration of the new run.

  Args:
    mode: one of `MODES`.
    base: configuration of the trained run.
    config: the same with the user's overrides.
    folder: of the trained run.
    adapter: a file with an adapter to merge; None: the run's own.

  Raises:
    UserError: something that the mode cannot do.
  """
  for field, was, got in diff(base, config):
    fixed = field.startswith(("model.", "routing.")) or field == "data.vocab_size"
    if fixed and field not in _MAY_DIFFER:
      raise ConfigError(field, got, f"{was!r}, as the base has it")
  if mode == "merge":
    if not (base.adapt.lora_rank or adapter):
      raise UserError(f"--base={folder}: wanted a run with adapters, or --adapter=FILE for this one")
    return dataclasses.replace(config, adapt=AdaptConfig())
  if base.adapt.lora_rank:
    raise UserError(f"--base={folder} has adapters: wanted them merged first (--mode=merge)")
  if mode == "quantise":
    return _quantised(base, config, folder)
  adapt = config.adapt
  if mode == "lora":
    adapt = dataclasses.replace(adapt, lora_rank=adapt.lora_rank or DEFAULT_RANK)
    if base.adapt.weights not in ("float32", adapt.weights):
      raise ConfigError("adapt.weights", adapt.weights, f"{base.adapt.weights}, as the base has it")
  elif adapt.weights != "float32" or adapt.lora_rank:
    raise UserError("--mode=finetune: wanted float32 weights and no adapters; for those there is --mode=lora")
  if config.routing.freezes_model:
    raise ConfigError("routing.learner", config.routing.learner, "another learner, since ppo trains no model")
  # The base has been through its warm-up of random counts.
  routing = dataclasses.replace(config.routing, warmup_steps=0)
  return dataclasses.replace(config, adapt=adapt, routing=routing, data=_data(base, config, folder))


def _quantised(base: Config, config: Config, folder: Path) -> Config:
  if base.adapt.weights != "float32":
    raise UserError(f"--base={folder} is in 4 bits already ({base.adapt.weights})")
  if config.adapt.lora_rank:
    raise ConfigError("adapt.lora_rank", config.adapt.lora_rank, "0 with --mode=quantise")
  book = DEFAULT_BOOK if config.adapt.weights == "float32" else config.adapt.weights
  return dataclasses.replace(config, adapt=AdaptConfig(weights=book), data=_data(base, config, folder))


def _data(base: Config, config: Config, folder: Path):
  """Returns the new run's data: other sources are read as the base's tokens, by the tokenizer in its folder."""
  found = sorted(folder.absolute().glob("tokenizer.*"))
  if config.data.tokenizer != base.data.tokenizer or not found:
    return config.data
  if config.data.sources == base.data.sources and not base.data.tokenizer:
    return config.data
  return dataclasses.replace(config.data, tokenizer=str(found[0]))
