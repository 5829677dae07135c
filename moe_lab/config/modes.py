"""What each mode of `experiments/adapt.py` makes of a trained run's configuration; whatever does not go is one line."""

import dataclasses
from pathlib import Path

import ml_collections

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.resolve import diff, resolve
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError

MODES = ("quantise", "lora", "merge", "finetune", "upcycle", "retrofit")
DEFAULT_RANK, DEFAULT_BOOK = 8, "nf4"
COPIES = 8  # of a dense MLP, where nothing else is asked for
SAVING = 0.4  # likewise, of the experts that every token took
# Fields of model and routing that only some modes let differ from what `begun` says.
_OF_MODE = {
  "upcycle": {"model.num_experts", "model.expert_dim", "routing.k"},
  "retrofit": {f"routing.{name}" for name in ("learner", "k_min", "budget_range", "policy_input", "second_rollouts")},
}
# Fields of model and routing that may differ from the base's: how it is computed, and how it is trained.
_MAY_DIFFER = {
  *(f"model.{name}" for name in ("dtype", "dispatch", "grouped_matmul", "capacity_factor", "remat")),
  *(f"model.{name}" for name in ("attention_backend", "attention_block", "position_interpolation", "sharpen_from")),
  *(f"routing.{name}" for name in ("budget", "budget_mode", "warmup_steps", "entropy_floor", "credit_discount")),
  *(f"routing.{name}" for name in ("load_balance_weight", "balance_scope", "z_loss_weight", "entropy_loss_weight")),
  *(f"routing.{name}" for name in ("bias_update_rate", "router_jitter", "gating_dropout", "expert_dropout")),
}


def begun(mode: str | None, base: Config, folder: str | Path) -> ml_collections.ConfigDict:
  """Returns the configuration that the user's overrides change: the base's, with what a mode makes of its routing.

  Args:
    mode: one of `MODES`.
    base: configuration of the trained run.
    folder: of it, for errors.

  Raises:
    UserError: nothing of that kind can be made of such a model.
  """
  model, routing, adapt = base.model, base.routing, base.adapt
  all_dense = model.num_dense_layers == model.num_layers
  if mode == "upcycle":
    if not all_dense or adapt != AdaptConfig():
      raise UserError(f"--base={folder}: wanted a model whose layers are all dense, in float32 and without adapters")
    model = dataclasses.replace(model, num_dense_layers=0, num_experts=COPIES, expert_dim=model.dense_dim)
    # Gates that sum to one, so that equal experts are the MLP that they were; the pieces of one have equal logits.
    routing = dataclasses.replace(routing, method="topk", k=2, gate="softmax_chosen", standardise=False)
  if mode == "retrofit":
    if all_dense or not routing.fixed or routing.k == 1:
      wanted = "a mixture of experts with routing.method = topk and routing.k of at least 2"
      raise UserError(f"--base={folder}: wanted {wanted}, not {routing.method} with k = {routing.k}")
    if routing.slot_gate == "softmax_unit":
      raise UserError(f"--base={folder}: wanted gates by softmax_chosen, softmax_all or sigmoid, not softmax_unit")
    gate = "softmax_kept" if routing.slot_gate == "softmax_chosen" else routing.slot_gate
    routing = dataclasses.replace(
      routing, method="dynamic", k_min=1, k_max=routing.k, budget=round((1 - SAVING) * routing.k, 2), gate=gate,
      bias_update_rate=0.0,  # or the choice of experts would move
    )  # fmt: skip
    adapt = dataclasses.replace(adapt, trunk="frozen")
  config = dataclasses.replace(base, model=model, routing=routing, adapt=adapt)
  return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def adapted(mode: str, base: Config, config: Config, folder: Path, adapter: str | None = None) -> Config:
  """Returns the configuration of the new run.

  Args:
    mode: one of `MODES`.
    base: configuration of the trained run.
    config: what `begun` made of it, with the user's overrides.
    folder: of the trained run.
    adapter: a file with an adapter to merge; None: the run's own.

  Raises:
    UserError: something that the mode cannot do.
  """
  for field, was, got in diff(resolve(begun(mode, base, folder)), config):
    fixed = field.startswith(("model.", "routing.")) or field == "data.vocab_size"
    if fixed and field not in _MAY_DIFFER | _OF_MODE.get(mode, set()):
      raise ConfigError(field, got, f"{was!r}, as the base has it")
  if mode == "merge":
    if not (base.adapt.lora_rank or adapter):
      raise UserError(f"--base={folder}: wanted a run with adapters, or --adapter=FILE for this one")
    return dataclasses.replace(config, adapt=AdaptConfig())
  if base.adapt.lora_rank:
    raise UserError(f"--base={folder} has adapters: wanted them merged first (--mode=merge)")
  if mode == "quantise":
    return _quantised(base, config, folder)
  if mode == "upcycle":
    return _upcycled(base, config)
  adapt = config.adapt
  if mode == "lora":
    adapt = dataclasses.replace(adapt, lora_rank=adapt.lora_rank or DEFAULT_RANK)
    if base.adapt.weights not in ("float32", adapt.weights):
      raise ConfigError("adapt.weights", adapt.weights, f"{base.adapt.weights}, as the base has it")
  if mode == "finetune":
    if adapt.weights != "float32" or adapt.lora_rank:
      raise UserError("--mode=finetune: wanted float32 weights and no adapters; for those there is --mode=lora")
    if config.routing.freezes_model:
      raise ConfigError("routing.learner", config.routing.learner, "another learner, since ppo trains no model")
    adapt = dataclasses.replace(adapt, trunk="trained")  # of a retrofitted model, too
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


def _upcycled(base: Config, config: Config) -> Config:
  """Checks the sizes: copies of a dense MLP, each of them cut into pieces of `model.expert_dim`."""
  hidden, width = base.model.dense_dim, config.model.expert_dim
  if hidden % width:
    raise ConfigError("model.expert_dim", width, f"a divisor of model.dense_dim = {hidden}")
  pieces = hidden // width
  for field, value in (("model.num_experts", config.model.num_experts), ("routing.k", config.routing.k)):
    if value % pieces:
      raise ConfigError(field, value, f"a multiple of {pieces}, the pieces of an MLP that model.expert_dim makes")
  return config


def _data(base: Config, config: Config, folder: Path):
  """Returns the new run's data: other sources are read as the base's tokens, by the tokenizer in its folder."""
  found = sorted(folder.absolute().glob("tokenizer.*"))
  if config.data.tokenizer != base.data.tokenizer or not found:
    return config.data
  if config.data.sources == base.data.sources and not base.data.tokenizer:
    return config.data
  return dataclasses.replace(config.data, tokenizer=str(found[0]))
