"""The files of a checkpoint folder: safetensors in one piece or in shards, read and written a tensor at a time."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_lab.errors import UserError
from moe_lab.interop.extra import need
from moe_lab.strict_json import parse

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a file, about
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # their names -> numpy's


def read_json(path: Path) -> dict:
  """Returns the object in a JSON file; raises UserError, which names the file, where there is none."""
  try:
    value = parse(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
  if not isinstance(value, dict):
    raise UserError(f"{path}: wanted a JSON object")
  return value


class Safetensors:
  """The tensors of a folder: a `tensors.Reader`.

  Attributes:
    where: the folder.
    names: file by file.
    files: that hold them.
    dtype: of all tensors, as numpy calls it; float32 where they differ, since it holds all of them exactly.
  """

  def __init__(self, folder: Path):
    """Opens the files' headers, and reads no tensor.

    Raises:
      UserError: no safetensors (pickles are refused: loading one runs what its author wrote), a shard that is
        missing or damaged, or tensors of a type that is no plain float.
    """
    self.where, safetensors = str(folder), need("safetensors")
    self.files, self._file_of, self._dtype_of = [], {}, {}
    listed = _listed(folder)
    for path in [folder / name for name in sorted(set(listed.values()))] or [_whole(folder)]:
      if not os.path.isfile(path):  # False also for a name that no file can have
        raise UserError(f"{path}: no such shard, but {INDEX} lists it")
      try:
        file = safetensors.safe_open(path, framework="numpy")
      except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
      self.files.append(path)
      for name in file.keys():  # noqa: SIM118
        kind = file.get_slice(name).get_dtype()
        if kind not in DTYPES:
          raise UserError(f"{path}: {name} is of type {kind}: wanted one of {', '.join(DTYPES)}")
        if name in self._file_of:
          raise UserError(f"{path}: {name} is in another file too")
        self._file_of[name], self._dtype_of[name] = file, DTYPES[kind]
    for name, file_name in listed.items():
      if name not in self._file_of:
        raise UserError(f"{folder / file_name} has no tensor {name}, but {INDEX} says so")
    self.names: Sequence[str] = tuple(self._file_of)
    dtypes = set(self._dtype_of.values())
    self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._file_of[name].get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    return self._file_of[name].get_tensor(name)


def _listed(folder: Path) -> dict[str, str]:
  """Returns the index, tensor -> file; {} where there is none."""
  if not (folder / INDEX).exists():
    return {}
  listed = read_json(folder / INDEX).get("weight_map")
  if not isinstance(listed, dict) or not listed:
    raise UserError(f"{folder / INDEX}: wanted a weight_map of tensor to file")
  for tensor, name in listed.items():
    # Nothing outside the folder, whatever a checkpoint that came from elsewhere says.
    if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\0" in name:
      raise UserError(f"{folder / INDEX}: {tensor} in {name!r}: wanted the name of a .safetensors file in this folder")
  return listed


def _whole(folder: Path) -> Path:
  if (folder / WHOLE).is_file():
    return folder / WHOLE
  shards = sorted(path.name for path in folder.glob("*.safetensors"))
  if shards:
    raise UserError(f"{folder} holds {shards[0]}, but neither {WHOLE} nor {INDEX}")
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
  if pickles:
    raise UserError(f"{folder / pickles[0]} is a pickle, which may run code when it is loaded: wanted safetensors")
  raise UserError(f"{folder} has no {WHOLE}")


def write(
  folder: Path, sizes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, np.ndarray]], dtype: str
) -> list[str]:
  """Writes tensors as safetensors, in several files where they are large; one file at a time is in memory.

  Args:
    folder: to write in.
    sizes: shape of each tensor, in the order of `tensors`.
    tensors: name and values, made one by one.
    dtype: to write, as numpy calls it.

  Returns:
    The names of the files.
  """
  save_file, dtype = need("safetensors.numpy").save_file, np.dtype(getattr(ml_dtypes, dtype, dtype))
  file_of, number, filled = {}, 0, 0
  for name, shape in sizes.items():
    size = math.prod(shape) * dtype.itemsize
    if filled and filled + size > SHARD_BYTES:
      number, filled = number + 1, 0
    file_of[name], filled = number, filled + size
  total = number + 1
  names = [WHOLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
  held: dict[str, np.ndarray] = {}

  def flush(number: int) -> None:
    save_file(held, folder / names[number], metadata={"format": "pt"})
    held.clear()

  last = 0
  for name, tensor in tensors:
    if file_of[name] != last:
      flush(last)
      last = file_of[name]
    held[name] = np.ascontiguousarray(tensor, dtype)
    assert held[name].shape == tuple(sizes[name])
  flush(last)
  if total > 1:
    index = {
      "metadata": {"total_size": sum(math.prod(shape) * dtype.itemsize for shape in sizes.values())},
      "weight_map": {name: names[number] for name, number in file_of.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
  return names
