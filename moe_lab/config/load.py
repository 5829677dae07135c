"""A config file (`FILE.py` or `FILE.py:arg`) to its ConfigDict; whatever is wrong with the file is one line."""

import os
import re
import traceback
from pathlib import Path
from types import ModuleType

import ml_collections

from moe_lab.config.resolve import SECTIONS, from_json, nearest_field
from moe_lab.config.schema import Config
from moe_lab.errors import UserError, did_you_mean


def load(spec: str) -> ml_collections.ConfigDict:
  """Returns what `get_config` of a config file returns.

  Args:
    spec: `FILE.py`, or `FILE.py:arg` to call `get_config(arg)`.

  Raises:
    UserError: no such file, or it does not run, or has no `get_config` that
      returns a ConfigDict. The line names the file and, where there is one, the line in it.
  """
  config = call(spec, flag="config", function="get_config", folder="configs")
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"--config={spec}: get_config() returned {type(config).__name__}: wanted a ConfigDict that began "
      "as moe_lab.config.base_config()"
    )
  return config.lock()


def of_run(folder: str) -> Config:
  """Returns the configuration of the run in a folder.

  Raises:
    UserError: there is no run, or its configuration cannot be read.
  """
  path = Path(folder).expanduser() / "config.json"
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, ValueError):
    raise UserError(f"--base={folder}: wanted the folder of a trained run, with its config.json") from None
  return from_json(text, source=str(path))


def call(spec: str, *, flag: str, function: str, folder: str) -> object:
  """Returns what a function of a user's Python file returns.

  Args:
    spec: `FILE.py`, or `FILE.py:arg` to call `function(arg)`.
    flag: that named the file, for the error.
    function: its name.
    folder: where such files are, to suggest one.

  Raises:
    UserError: as `load`.
  """
  name, colon, arg = spec.partition(":")
  path = Path(name).expanduser()
  if path.suffix != ".py" or not os.path.isfile(path):  # False also for a name that no file can have
    kind = "a config file" if flag == "config" else f"a {flag} file"
    raise UserError(f"--{flag}={spec}: wanted {kind} FILE.py or FILE.py:arg{_nearest_file(path, Path(folder))}")
  try:
    called = getattr(_execute(path), function, None)
    if not callable(called):
      raise UserError(f"--{flag}={spec}: wanted a file that defines {function}(arg=None)")
    return called(arg) if colon else called()
  except UserError:
    raise
  except Exception as error:
    where = _where(path, error)
    raise UserError(f"{where}: {_why(where, error)}") from error


def _execute(path: Path) -> ModuleType:
  # Not imported: import would look for bytecode, which is stale if a file is written twice within its time stamp.
  module = ModuleType(f"config_file_{path.stem}")
  module.__file__ = str(path)
  exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
  return module


def _nearest_file(path: Path, usual: Path) -> str:
  folder = path.parent if os.path.isdir(path.parent) else usual
  return did_you_mean(str(path), [str(file) for file in sorted(folder.glob("*.py"))])


def _where(path: Path, error: Exception) -> str:
  """Returns "FILE:LINE: `code`" of the last line that ran in the file, or "FILE"."""
  if isinstance(error, SyntaxError) and error.filename == str(path):
    return f"{path}:{error.lineno}: `{(error.text or '').strip()}`"
  inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
  return f"{path}:{inside[-1].lineno}: `{inside[-1].line}`" if inside else str(path)


def _why(where: str, error: Exception) -> str:
  # ConfigDict wraps its KeyError in an AttributeError, and writes all its fields into the text.
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = str(error.args[0]) if error.args else ""
  locked = re.match(r"""Key "(\w+)" does not exist|'(\w+)'(?:\n|$)""", text)
  if isinstance(error, KeyError) and locked:
    key = locked[1] or locked[2]
    # The section is not in the error, but mostly in the line: `config.train.stepz`, `config.train["stepz"]`.
    section = re.search(rf"(\w+)\W+{key}\b", where)
    name = f"{section[1]}.{key}" if section is not None and section[1] in SECTIONS else key
    return f"there is no field {name!r}{nearest_field(name)}"
  return f"{type(error).__name__}: {text.partition(chr(10))[0]}"
