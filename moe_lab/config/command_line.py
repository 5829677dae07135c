"""The command line of a program: `--config=FILE.py[:arg] --config.a.b=value --workdir=DIR` and its own few flags.

absl and config_flags parse; this file makes one line of what they have to say
about a mistake. config_flags alone answers a misspelt override with a trace.
"""

import ast
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from moe_lab.config.load import load, of_run
from moe_lab.config.modes import begun
from moe_lab.config.resolve import FIELDS, in_words, resolve, unknown_field
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError, did_you_mean

flags.disclaim_key_flags()  # --help lists the shared flags with the program's own


class _ListParser(tuple_parser.TupleParser):
  """Takes `a,b` and `a` as well as the literal `('a', 'b')`: shells make the quotes of the literal tiresome."""

  def parse(self, argument):
    if not isinstance(argument, str) or argument.lstrip().startswith(("(", "[", "'", '"')):
      return super().parse(argument)
    return tuple(_number_or_text(item.strip()) for item in argument.split(",") if item.strip())


_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)=?(.*)", re.DOTALL)
config_flags.register_flag_parser_for_type(tuple, _ListParser())


def _number_or_text(item: str) -> float | str:
  try:
    value = ast.literal_eval(item)
  except (SyntaxError, ValueError):
    return item
  return value if isinstance(value, int | float) else item


def define(own: flags.FlagValues, takes: set[str]) -> None:
  """Adds `--config` and `--workdir`, as far as the program takes them, to its own flags."""
  if "config" in takes:
    flags.DEFINE_string(
      "config",
      None,
      "A config file, FILE.py or FILE.py:arg. --config.SECTION.FIELD=VALUE then overrides one of its "
      "fields; moe_lab/config/schema.py and the files beside it list them. A list is written a,b or \"('a', 'b')\".",
      flag_values=own,
    )
  if "workdir" in takes:
    flags.DEFINE_string("workdir", None, "The folder of the run.", flag_values=own)


def parse(
  argv: list[str], own: flags.FlagValues, required: set[str], words: Sequence[str] = ()
) -> dict[str, Config | Path | str]:
  """Parses `argv` into `own`.

  Args:
    argv: the command line, program name first.
    own: the program's flags.
    required: which of config and workdir must be given.
    words: names of what stands on the command line without a flag, in order.

  Returns:
    `config` and `workdir`, those of them that were given, and every word: "" if it is missing.

  Raises:
    UserError: one line for any mistake on the command line, in the config file, or in the fields together.
  """
  own.set_gnu_getopt(True)
  rest = _translated(own, argv, own, known_only=True)
  for arg in rest[1:]:
    # Before anything is missed: with --wokdir=x it is not --workdir that the user forgot.
    if arg.startswith("--") and not (_OVERRIDE.match(arg) and "config" in own):
      raise _unknown(arg, own)
  for name in sorted(required):
    if not own[name].value:
      wanted = "a config file, as in --config=configs/quickstart.py" if name == "config" else "a folder for the run"
      raise UserError(f"--{name}: wanted {wanted}")
  overrides = flags.FlagValues()
  config = None
  if "config" in own:
    config = _begun(own)
  if config is not None:
    _define_overrides(overrides, config, rest)
  left = _translated(own, rest, overrides)[1:]
  if len(left) > len(words):
    wanted = f"{' '.join(words)} and flags only" if words else "flags only"
    raise UserError(f"{left[len(words)]!r}: wanted {wanted}, as in --name=value")
  parsed = dict(itertools.zip_longest(words, left, fillvalue=""))
  if config is not None:
    parsed["config"] = resolve(config)
  if "workdir" in own and own["workdir"].value:
    parsed["workdir"] = Path(own["workdir"].value).expanduser()
  return parsed


def _begun(own: flags.FlagValues) -> ml_collections.ConfigDict | None:
  """Returns the configuration before overrides: a file's, or that of the run which a program's `--base` names."""
  spec, base = own["config"].value, own["base"].value if "base" in own else None
  if spec and base:
    raise UserError(f"--config={spec}: wanted only overrides, --config.SECTION.FIELD=VALUE, of the run in --base")
  if base:
    return begun(own["mode"].value if "mode" in own else None, of_run(base), base)
  return load(spec) if spec else None


def _define_overrides(overrides: flags.FlagValues, config: ml_collections.ConfigDict, argv: list[str]) -> None:
  for arg in argv[1:]:
    match = _OVERRIDE.match(arg)
    if match and match[1] not in FIELDS:
      raise unknown_field(match[1], match[2])
  # Defines one flag for each override that it finds in sys_argv.
  config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=argv)


def _translated(
  own: flags.FlagValues, argv: list[str], values: flags.FlagValues, known_only: bool = False
) -> list[str]:
  """Returns what `values` leaves of `argv`; absl's errors become ours."""
  try:
    return values(argv, known_only=known_only)
  except flags.UnrecognizedFlagError as error:
    raise _unknown(error.flagvalue, own) from None
  except flags.IllegalFlagValueError as error:
    raise _illegal(str(error), values) from None
  except (flags.Error, ValueError) as error:
    raise UserError(str(error)) from None


def _unknown(arg: str, own: flags.FlagValues) -> UserError:
  known = ["--" + name for name in sorted(own) if name not in ("flagfile", "undefok")]
  fields = ["--config." + field for field in FIELDS if "--config" in known]
  hint = did_you_mean(arg.partition("=")[0], known + fields)
  return UserError(f"{arg}: wanted one of {', '.join(known)}{hint}")


def _illegal(message: str, values: flags.FlagValues) -> UserError:
  match = re.match(r"flag --([\w.]+)=(.*?): (.*)", message, re.DOTALL)
  if match is None:
    return UserError(message)
  name, value, reason = match.groups()
  field = name.removeprefix("config.")
  if field in FIELDS:
    return ConfigError(field, value, in_words(field))
  parser = values[name].parser
  choices = getattr(parser, "enum_values", None)
  if choices:
    reason = f"wanted one of {', '.join(choices)}{did_you_mean(value, choices)}"
  elif parser.syntactic_help:
    reason = f"wanted {parser.syntactic_help}"
  return UserError(f"--{name}={value}: {reason}")
