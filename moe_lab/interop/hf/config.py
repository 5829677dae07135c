"""config.json of a Hugging Face checkpoint to our configuration, and back.

What is not understood is refused, never guessed: a model that is read as another one gives plausible nonsense.
"""

import dataclasses
from collections.abc import Mapping

from moe_lab.config.resolve import FIELDS, from_dict
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError, did_you_mean
from moe_lab.interop.hf.families import FAMILIES, Family

_FIELDS = {  # key -> our field, in every family
  "hidden_size": "model.dim",
  "num_hidden_layers": "model.num_layers",
  "num_attention_heads": "model.num_heads",
  "num_key_value_heads": "model.num_kv_heads",
  "head_dim": "model.head_dim",
  "rms_norm_eps": "model.norm_epsilon",
  "tie_word_embeddings": "model.tie_embeddings",
  "vocab_size": "data.vocab_size",
}
_DEFAULT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}
_ONLY = {  # key -> the only value that the model code knows; it may be left out
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "clip_qkv": None,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
}
_ALWAYS = {
  "model.position": "rotary",
  "model.scale_embeddings": False,
  "routing.method": "topk",
  "routing.standardise": False,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Of the fields of the model, those that say how it is computed rather than what.
_HOW = {
  "dtype", "attention_backend", "attention_block", "dispatch", "grouped_matmul", "capacity_factor", "remat",
}  # fmt: skip
_KINDS = {  # of keys that are looked into before they become a field of ours
  "max_position_embeddings": int,
  "sliding_window": int,
  "decoder_sparse_step": int,
  "mlp_only_layers": list,
  "rope_scaling": dict,
  "rope_parameters": dict,
}
_MOST_TENSORS = 10**6  # layers times experts: a count that comes from a file is not to fill the memory with names
_LONGEST_ROW = 1024  # of evaluation and training, unless the user says otherwise


def family_of(raw: Mapping, where: str) -> Family:
  """Returns the family of a config.json; raises UserError for one that has no table."""
  name = raw.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(f"{where}: model_type {name!r}: wanted one of {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}")
  return FAMILIES[name]


def to_config(raw: Mapping, where: str) -> Config:
  """Returns the configuration that a config.json describes.

  Args:
    raw: its content.
    where: its path, for errors.

  Raises:
    UserError: an unknown family, a key that is missing, or something that the model code cannot do.
  """
  family = family_of(raw, where)
  read = _Keys(raw, _DEFAULT | family.default, where)
  read.check_known(_FIELDS | family.fields)
  values: dict[str, object] = _ALWAYS | family.always
  for key, field in (_FIELDS | family.fields).items():
    values[field] = read[key]
  sparse = "model.num_experts" in family.fields.values()
  num_layers = read["num_hidden_layers"]
  values["model.num_dense_layers"] = _dense_layers(read, num_layers) if sparse else num_layers
  if not sparse:  # nothing reads these
    values |= {"model.num_experts": 1, "routing.k": 1, "routing.gate": "softmax_all"}
  if "norm_topk_prob" in family.default:
    values["routing.gate"] = "softmax_chosen" if read["norm_topk_prob"] else "softmax_all"
  values |= _positions(read)
  values["data.seq_len"] = min(_LONGEST_ROW, raw.get("max_position_embeddings") or _LONGEST_ROW)
  sections: dict[str, dict] = {}
  for field, value in values.items():
    section, _, name = field.partition(".")
    sections.setdefault(section, {})[name] = value
  try:
    return from_dict(sections)
  except ConfigError as error:
    raise UserError(f"{where}: {error}") from None


def to_raw(config: Config, family: Family, original: Mapping) -> dict:
  """Returns the config.json of a model in a family; the way back from it gives the same model.

  Args:
    config: of the model.
    family: whose table its parameters fit.
    original: the config.json that it was imported from, whose other keys are kept; {}: none.

  Raises:
    UserError: the family has no such models; the line names the first field.
  """
  values = {field: _get(config, field) for field in FIELDS}
  values["model.shared_dim"] = config.model.shared_width
  kept = {key: value for key, value in original.items() if key not in ("rope_scaling", "rope_theta", "auto_map")}
  raw = {"max_position_embeddings": config.data.seq_len} | kept
  raw |= {"model_type": family.name, "architectures": [family.architecture], "hidden_act": "silu"}
  raw |= {key: values[field] for key, field in (_FIELDS | family.fields).items()}
  if "norm_topk_prob" in family.default:
    raw["norm_topk_prob"] = config.routing.slot_gate == "softmax_chosen"
  if config.model.num_dense_layers < config.model.num_layers and config.model.num_dense_layers:
    raw |= {"mlp_only_layers": list(range(config.model.num_dense_layers)), "decoder_sparse_step": 1}
  if family.name in ("mistral", "mixtral"):  # whose default is another
    raw["sliding_window"] = original.get("sliding_window")
  raw["rope_parameters"] = rope = {"rope_type": "default", "rope_theta": config.model.rotary_base}
  if config.model.rotary_stretch:
    rope |= {"rope_type": "llama3"} | dict(zip(_LLAMA3, config.model.rotary_stretch, strict=True))
    rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
  elif config.model.position_interpolation != 1:
    rope |= {"rope_type": "linear", "factor": config.model.position_interpolation}
  mine, theirs = decisive(config), decisive(to_config(raw, f"as {family.name}"))
  for field in sorted(mine.keys() | theirs.keys()):
    if mine.get(field) != theirs.get(field):
      raise ConfigError(field, mine.get(field), f"{theirs.get(field)!r}, for a {family.name} model")
  return raw


def decisive(config: Config) -> dict[str, object]:
  """Returns the fields that decide what the model computes, with those that make no difference left out."""
  model, routing = config.model, config.routing
  moot = _HOW | {"num_shared_experts", "shared_dim", "qk_norm_over" if not model.qk_norm else ""}
  moot |= {"num_global_groups"} if model.position == "rotary" else set()
  moot |= {"qk_bound"} if not model.qk_norm else set()
  moot |= {"dense_dim"} if not model.num_dense_layers else set()
  found = {f"model.{field.name}": getattr(model, field.name) for field in dataclasses.fields(model)}
  if model.num_dense_layers == model.num_layers:
    moot |= {"num_experts", "expert_dim", "shared_gate"}
  else:
    moot |= set() if model.shared_width else {"shared_gate"}
    found["model.shared_dim, or num_shared_experts x expert_dim"] = model.shared_width
    found |= {f"routing.{name}": getattr(routing, name) for name in ("method", "groups_kept", "expert_groups")}
    found |= {
      "routing.k": routing.slots,
      "routing.gate": routing.slot_gate,
      "routing.standardise": routing.standardised,
    }
  return {field: value for field, value in found.items() if field.partition(".")[2] not in moot}


class _Keys:
  """The keys of a config.json; None counts as left out."""

  def __init__(self, raw: Mapping, default: Mapping, where: str):
    self.raw, self.default, self.where = raw, default, where

  def __getitem__(self, key: str):
    if (value := self.get(key)) is not None:
      return value
    if key == "num_key_value_heads":
      return self["num_attention_heads"]
    if key == "head_dim":
      return self["hidden_size"] // self["num_attention_heads"]
    if key == "num_experts" and "num_local_experts" in self.raw:  # transformers 5 calls it so in some families
      return self.raw["num_local_experts"]
    raise UserError(f"{self.where}: no {key}, which the model needs")

  def get(self, key: str):
    value = self.raw.get(key)
    return self.default.get(key) if value is None else value

  def refuse(self, key: str, got: object, wanted: str) -> UserError:
    return UserError(f"{self.where}: {key} = {got!r}: wanted {wanted}")

  def check_known(self, fields: Mapping[str, str]) -> None:
    """Raises UserError for what the model code cannot do, and for `fields` (key -> ours) whose size is none."""
    for key, field in fields.items():
      if (got := self.raw.get(key)) is not None and FIELDS[field] is int and not (type(got) is int and got > 0):
        raise self.refuse(key, got, "a positive integer")
    for key, kind in _KINDS.items():
      if (got := self.raw.get(key)) is not None and not (type(got) is kind and (kind is not int or got >= 0)):
        raise self.refuse(key, got, {int: "an integer", list: "a list", dict: "an object"}[kind])
    experts = self.raw.get("num_experts") or self.raw.get("num_local_experts") or 1
    if type(experts) is int and self["num_hidden_layers"] * max(experts, 1) > _MOST_TENSORS:
      raise self.refuse("num_hidden_layers", self["num_hidden_layers"], f"at most {_MOST_TENSORS:,} tensors of experts")
    for key, only in _ONLY.items():
      if (got := self.raw.get(key)) is not None and got != only:
        raise self.refuse(key, got, f"{only!r}, the only one that is supported")
    window = self.raw["sliding_window"] if "sliding_window" in self.raw else self.default.get("sliding_window")
    longest = self.raw.get("max_position_embeddings") or float("inf")
    # Within the window it makes no difference.
    if window and self.raw.get("use_sliding_window", True) and longest > window:
      raise self.refuse("sliding_window", window, f"none, or max_position_embeddings = {longest} no larger")


def _dense_layers(read: _Keys, num_layers: int) -> int:
  """Returns how many layers from the bottom are dense; raises UserError where dense ones come after sparse ones."""
  step, listed = read.get("decoder_sparse_step") or 1, read.get("mlp_only_layers") or ()
  dense = [z for z in range(num_layers) if z in listed or (z + 1) % step]
  if dense != list(range(len(dense))):
    raise read.refuse("mlp_only_layers, decoder_sparse_step", (list(listed), step), "dense layers at the bottom only")
  if len(dense) == num_layers:
    raise read.refuse("mlp_only_layers, decoder_sparse_step", (list(listed), step), "at least one layer with experts")
  return len(dense)


def _positions(read: _Keys) -> dict[str, object]:
  """Returns our fields of the rotary embedding. Its keys were flat before transformers 5."""
  rope = {"rope_theta": read["rope_theta"]} | (read.get("rope_scaling") or {}) | (read.get("rope_parameters") or {})
  kind = rope.get("rope_type") or rope.get("type") or "default"
  found: dict[str, object] = {"model.rotary_base": rope["rope_theta"]}
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise read.refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0, the only one that is supported")
  try:
    if kind == "linear":
      found["model.position_interpolation"] = rope["factor"]
    elif kind == "llama3":
      found["model.rotary_stretch"] = tuple(rope[key] for key in _LLAMA3)
    elif kind != "default":
      raise read.refuse("rope_type", kind, f"default, linear or llama3{did_you_mean(kind, ('linear', 'llama3'))}")
  except KeyError as error:
    raise UserError(f"{read.where}: rope_type {kind!r} has no {error.args[0]}") from None
  return found


def _get(config: Config, field: str) -> object:
  section, _, name = field.partition(".")
  return getattr(getattr(config, section), name)
