"""JSON from a file that anybody may have written: whatever is odd about it is a ValueError."""

import json


def parse(text: str | bytes) -> object:
  """Returns what a JSON text says.

  Raises:
    ValueError: it is not JSON, is nested too deeply to be read, or names a key twice, which two readers would read in
      two ways.
  """
  try:
    return json.loads(text, object_pairs_hook=_once)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, object]]) -> dict:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
  return found
