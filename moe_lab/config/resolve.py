"""ConfigDict, dictionary and JSON to the schema and back, strictly.

Config files edit a ConfigDict, since that is what absl overrides; everything
else receives the frozen dataclasses. This file is the gate between the two: a
field that the schema does not know, or a value of another type, stops here.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping

import ml_collections

from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError, did_you_mean
from moe_lab.strict_json import parse

SECTIONS = typing.get_type_hints(Config)  # name -> dataclass
FIELDS = {  # dotted name -> type
  f"{section}.{name}": kind for section, cls in SECTIONS.items() for name, kind in typing.get_type_hints(cls).items()
}
_IN_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def base_config() -> ml_collections.ConfigDict:
  """Returns the schema's defaults as a locked ConfigDict: what every config file starts from."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def resolve(config: ml_collections.ConfigDict) -> Config:
  """Returns the checked configuration.

  Raises:
    ConfigError: an unknown field, a value of the wrong type or out of range, or
      fields that contradict each other.
  """
  return from_dict(config.to_dict())


def from_dict(raw: Mapping) -> Config:
  """Returns the checked configuration that nested dictionaries describe.

  A field that is missing takes its default, so a run saved before the field
  existed still loads; a misspelt one is unknown, and an error.

  Raises:
    ConfigError: as `resolve`.
  """
  sections = {}
  for section, fields in raw.items():
    if section not in SECTIONS:
      raise unknown_field(section, fields)
    if not isinstance(fields, Mapping):
      raise ConfigError(section, fields, f"a section of fields, such as {section}.{_names_in(section)[0]}")
    for name, value in fields.items():
      if f"{section}.{name}" not in FIELDS:
        raise unknown_field(f"{section}.{name}", value)
    values = {name: _typed(f"{section}.{name}", value, FIELDS[f"{section}.{name}"]) for name, value in fields.items()}
    sections[section] = SECTIONS[section](**values)
  return Config(**sections)


def to_json(config: Config) -> str:
  """Returns the text of a run's config.json."""
  return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def from_json(text: str, source: str = "config.json") -> Config:
  """Returns the configuration that `to_json` wrote. A saved run is loaded from here only: JSON executes nothing.

  Raises:
    UserError: not JSON, or not ours; its one line names `source` and the first thing wrong.
  """
  try:
    raw = parse(text)
  except ValueError as error:
    raise UserError(f"{source} is not valid JSON: {error}") from None
  # A file without our sections would otherwise read as all defaults. Younger ones are not in every run.
  older = [name for name in SECTIONS if name not in ("mesh", "adapt")]
  missing = [name for name in older if not isinstance(raw, dict) or name not in raw]
  if missing:
    raise UserError(f"{source} is not the configuration of a run: it has no section {missing[0]!r}")
  try:
    return from_dict(raw)
  except ConfigError as error:
    raise UserError(f"{source}: {error}") from None


def diff(a: Config, b: Config) -> list[tuple[str, object, object]]:
  """Returns (dotted field, a's value, b's value) of every field in which the two differ."""
  both = ((field, _get(a, field), _get(b, field)) for field in FIELDS)
  return [(field, of_a, of_b) for field, of_a, of_b in both if of_a != of_b]


def nearest_field(name: str) -> str:
  """Returns " (did you mean 'train.steps'?)" or "". A bare name is compared with the last parts of the fields."""
  if "." in name:
    return did_you_mean(name, FIELDS)
  by_leaf = {field.partition(".")[2]: field for field in reversed(FIELDS)}
  near = difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.5)
  return f" (did you mean {by_leaf[near[0]]!r}?)" if near else ""


def unknown_field(name: str, value: object) -> ConfigError:
  """Returns the error for a dotted name that is no field."""
  if name in SECTIONS:
    return ConfigError(name, value, f"one of its fields: {', '.join(_names_in(name))}")
  if isinstance(value, Mapping):
    return ConfigError(name, value, f"a section: {', '.join(SECTIONS)}{did_you_mean(name, SECTIONS)}")
  return ConfigError(name, value, f"the name of a field{nearest_field(name)}")


def in_words(field: str) -> str:
  """Returns what a field takes, for error lines."""
  kind = FIELDS[field]
  if typing.get_origin(kind) is tuple:
    return "a list, each item " + _IN_WORDS[typing.get_args(kind)[0]]
  return _IN_WORDS[kind]


def _names_in(section: str) -> list[str]:
  return [field.name for field in dataclasses.fields(SECTIONS[section])]


def _get(config: Config, field: str) -> object:
  section, _, name = field.partition(".")
  return getattr(getattr(config, section), name)


def _typed(field: str, value: object, kind: type) -> object:
  """Returns `value` as `kind`, losslessly: an integer is a float, a list is a tuple, and nothing else changes."""
  if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
    return tuple(_typed(field, item, typing.get_args(kind)[0]) for item in value)
  # bool first: Python counts True as an integer.
  if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
    with contextlib.suppress(OverflowError):
      return float(value)
  if kind is int and isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
    return value
  if kind is str and isinstance(value, str):
    return value
  if kind is bool and isinstance(value, bool):
    return value
  raise ConfigError(field, value, in_words(field))
