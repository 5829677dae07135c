"""Errors that are the user's to mend: one line, no traceback.

The programs catch `UserError`, print its message on stderr and leave with its
`exit_code`. Everything else is a bug and keeps its traceback.
"""

import difflib
import importlib.util
from collections.abc import Iterable

_MOST = 1000  # characters of a value that a line repeats
PREEMPTED = 75  # exit code after SIGTERM (EX_TEMPFAIL): saved, safe to start again


def visible(text: str) -> str:
  """Returns text that a terminal shows and does not obey: control characters, but for line ends and tabs, as pictures.

  Texts of models, corpora and other people's files may hold escape sequences.
  """
  return "".join(_picture(c) if c < " " and c not in "\n\t" or "\x7f" <= c <= "\x9f" else c for c in text)


def _picture(control: str) -> str:
  return chr(0x2400 + ord(control)) if control < " " else "\N{REPLACEMENT CHARACTER}"


class UserError(Exception):
  """A mistake outside the program: one line that says what to change.

  It is one line that a terminal may have, whatever a file's name or content brings into it.
  """

  exit_code = 2

  def __init__(self, message: str):
    super().__init__(visible(" ".join(str(message).splitlines())))


class ConfigError(UserError):
  """A configuration field that cannot be used as given.

  Attributes:
    field: dotted name of the field, as it would be written on the command line.
  """

  def __init__(self, field: str, got: object, wanted: str):
    super().__init__(f"config.{field} = {_short(got)}: wanted {wanted}")
    self.field = field
    self._parts = (field, got, wanted)

  def __reduce__(self):
    # An exception is pickled by the message alone, and could not be made again from it in another process.
    return type(self), self._parts


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= _MOST else f"{text[:_MOST]}..."


class RunError(UserError):
  """The run itself failed (diverged, disk full, ...): exit code 1."""

  exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the nearest of `known`, or ""."""
  near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
  return f" (did you mean {near[0]!r}?)" if near else ""


def require(package: str, wanted_by: str, extra: str) -> None:
  """Raises UserError if a package of an extra is not installed; `wanted_by` is what the user asked for."""
  if importlib.util.find_spec(package) is None:
    raise UserError(f"{wanted_by} wants {package}, of the extra `{extra}` of this package: pip install -e '.[{extra}]'")
