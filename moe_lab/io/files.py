"""Small files that are whole or absent, and JSON that every reader accepts."""

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np


def jsonable(value: object) -> object:
  """Returns `value` in JSON's own types: arrays as lists, NaN and infinity as null.

  Strict JSON has no NaN, and many readers refuse a file that holds one.

  Args:
    value: nested dicts and sequences of Python, NumPy or JAX scalars and arrays,
      strings, paths and None.

  Raises:
    TypeError: for anything else.
  """
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {str(key): jsonable(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(item) for item in value]
  if isinstance(value, Path):
    return str(value)
  if hasattr(value, "__array__"):
    array = np.asarray(value)
    if array.dtype == object:
      raise TypeError(f"cannot write {value!r} as JSON")
    # bfloat16 and its kin are unknown to `tolist`; float32 holds them exactly.
    return jsonable((array.astype(np.float32) if array.dtype.kind == "V" else array).tolist())
  raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON")


def dump_json(value: object, indent: int | None = None) -> str:
  """Returns strict JSON of anything that `jsonable` takes."""
  return json.dumps(jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False)


def open_up(path: Path) -> None:
  """Makes a file or folder that was made private one for everyone whom the umask admits."""
  umask = os.umask(0)
  os.umask(umask)
  path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_text(path: Path, text: str) -> None:
  """Replaces `path` by `text` in one step: a reader, or a crash, sees the old file or the new one.

  Raises:
    OSError: the file cannot be written; `path` is then as it was.
  """
  handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
  try:
    # Text from a corpus may hold lone surrogates, which UTF-8 cannot spell.
    with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    open_up(Path(scratch))
    os.replace(scratch, path)
  except BaseException:
    Path(scratch).unlink(missing_ok=True)
    raise
