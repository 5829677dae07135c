"""numpy's .npz of arrays, read without pickles and without more memory than the file has bytes."""

import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

_MOST_HEADER = 1 << 16  # bytes of an array's header


def read_npz(path: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a file that `np.savez` wrote.

  Raises:
    OSError: it cannot be read.
    ValueError: it is another file, a part is compressed or a pickle, or a header claims more than is there.
  """
  found = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
          raise ValueError(f"{entry.filename!r} is compressed")  # and may be of any size when it is not
        with archive.open(entry) as file:
          found[entry.filename.removesuffix(".npy")] = _array(file.read())
  except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError) as error:
    raise ValueError(f"it is no whole .npz: {error}") from None
  return found


def _array(data: bytes) -> np.ndarray:
  file = io.BytesIO(data)
  version = np.lib.format.read_magic(file)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, in_columns, dtype = read(file, max_header_size=_MOST_HEADER)
  if dtype.hasobject:
    raise ValueError("it holds a pickle, which may run code when it is loaded")
  if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
    raise ValueError("an array's header claims another size than it has")
  values = np.frombuffer(data, dtype, offset=file.tell()) if len(data) > file.tell() else np.empty(0, dtype)
  return values.reshape(shape, order="F" if in_columns else "C").copy()
