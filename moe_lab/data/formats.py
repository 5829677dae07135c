"""Files as documents: text, JSONL and ArrayRecord, each read once in full when opened and by position afterwards.

The first reading checks every document, so a broken one stops the program before a step is taken, not in hour ten.
Only positions stay in memory (and, while it is checked, one file).
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.errors import ConfigError

# Longer text files are cut, at line ends, so that one large file can be divided into training, validation and test.
MAX_TEXT_BYTES = 64 * 1024


class Document(NamedTuple):
  """A text and where it came from."""

  name: str
  text: str


class FoundFile(NamedTuple):
  """A file of a source, and its name in documents, errors and the manifest."""

  path: Path
  name: str


class DocumentSource:
  """Random access to the documents of a source; the order is that of the files' names.

  Attributes:
    spec: the entry of `config.data.sources`.
  """

  def __init__(self, spec: str, files: list[FoundFile], license: str | None = None):
    self.spec = spec
    self._files = files
    self._positions: list[tuple[int, Any]] = []  # per document: the file's index, and the place in it
    self._manifest = []
    for index, file in enumerate(files):
      data = readable(spec, file.path)
      self._positions += [(index, place) for place in self._scan(file, data)]
      sha256 = hashlib.sha256(data).hexdigest()
      self._manifest.append({"file": file.name, "sha256": sha256, "bytes": len(data), "license": license})
    if not self._positions:
      raise ConfigError("data.sources", spec, f"at least one document that is not empty ({len(files)} file(s) read)")

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> Document:
    file_index, place = self._positions[index]
    return self._read(self._files[file_index], place)

  def manifest(self) -> list[dict]:
    """Returns a {file, sha256, bytes, license} for each file; `license` is an SPDX name, or None if unknown."""
    return self._manifest

  def _scan(self, file: FoundFile, data: bytes) -> Iterator[Any]:
    """Yields the place of each document in a file; raises ConfigError for one that cannot be read."""
    raise NotImplementedError

  def _read(self, file: FoundFile, place: Any) -> Document:
    """Returns the document at a place."""
    raise NotImplementedError

  def _decode(self, file: FoundFile, data: bytes, offset: int = 0) -> str:
    try:
      return data.decode("utf-8")
    except UnicodeDecodeError as error:
      where = f"{file.name!r} has an invalid byte at offset {offset + error.start}"
      raise ConfigError("data.sources", self.spec, f"UTF-8 text ({where})") from None


def readable(spec: str, path: Path) -> bytes:
  """Returns a file's bytes; one that the system refuses is the user's error."""
  try:
    return path.read_bytes()
  except OSError as error:
    raise ConfigError("data.sources", spec, f"files that can be read ({str(path)!r}: {error.strerror})") from None


class TextFiles(DocumentSource):
  """A document a file; files over `MAX_TEXT_BYTES` are cut at line ends into documents of about that size."""

  def _scan(self, file, data):
    self._decode(file, data)
    parts = -(-len(data) // MAX_TEXT_BYTES)
    start = 0
    while start < len(data):
      end = _cut(data, start, start + -(-len(data) // parts))
      yield start, end
      start = end

  def _read(self, file, place):
    start, end = place
    with open(file.path, "rb") as handle:
      handle.seek(start)
      text = self._decode(file, handle.read(end - start), start)
    return Document(f"{file.name}@{start}", text)


def _cut(data: bytes, start: int, end: int) -> int:
  """Returns the first line end at or after `end`; in a line without one nearby, the next start of a character."""
  if end >= len(data):
    return len(data)
  line_end = data.find(b"\n", end - 1, start + 2 * MAX_TEXT_BYTES) + 1
  if line_end:
    return line_end
  while end < len(data) and data[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
    end += 1
  return end


class JsonlFiles(DocumentSource):
  """A document a line: the string in its "text" field. Blank lines and empty texts are passed over."""

  wanted = 'a JSON object with a "text" on each line'

  def _scan(self, file, data):
    start = 0
    for number, line in enumerate(io.BytesIO(data), 1):  # lines end at \n alone: JSON may hold other separators
      if line.strip() and self._text(file, line, start, number):
        yield start, len(line), number
      start += len(line)

  def _read(self, file, place):
    start, size, number = place
    with open(file.path, "rb") as handle:
      handle.seek(start)
      text = self._text(file, handle.read(size), start, number)
    return Document(f"{file.name}:{number}", text)

  def _text(self, file: FoundFile, line: bytes, start: int, number: int) -> str:
    text, found = self._decode(file, line, start), None
    try:
      value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone: an integer of thousands of digits
      fault = f"is not JSON: {getattr(error, 'msg', error)}"
    else:
      if not isinstance(value, dict):
        fault = "is not an object"
      else:
        found, fault = self._field(value)
        if found is not None and not _encodable(found):
          found, fault = None, "has half of a surrogate pair in its text"
    if found is None:
      raise ConfigError("data.sources", self.spec, f"{self.wanted} ({file.name!r} line {number} {fault})")
    return found

  def _field(self, value: dict) -> tuple[str | None, str]:
    """Returns what a line says, or None and what is wrong with it."""
    if not isinstance(value.get("text"), str):
      return None, 'has no string "text"'
    return value["text"], ""


def _encodable(text: str) -> bool:
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


class ArrayRecordFiles(DocumentSource):
  """A document a record: a JSON object with a "text", or else the record itself as UTF-8."""

  # For reading by position: the default reads 16 MB ahead.
  _RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"

  def _scan(self, file, data):
    del data  # the library opens files by name
    reader = self._open(file)
    try:
      count = reader.num_records() if reader.ok() else 0
      if not count:
        raise RuntimeError("it holds no records, or has lost its end")
      for index in range(count):
        if self._text(file, reader.read([index])[0], index):
          yield index
      reader.close()
    except (RuntimeError, IndexError) as error:
      raise self._corrupt(file, error) from None

  def _read(self, file, place):
    readers = self.__dict__.setdefault("_readers", {})  # opening one reads its index: once
    if file.name not in readers:
      readers[file.name] = self._open(file)
    return Document(f"{file.name}[{place}]", self._text(file, readers[file.name].read([place])[0], place))

  def _text(self, file: FoundFile, record: bytes, index: int) -> str:
    text = self._decode(FoundFile(file.path, f"{file.name}[{index}]"), record)
    if text.startswith("{"):
      try:
        value = json.loads(text)
      except (ValueError, RecursionError):
        return text
      if isinstance(value, dict) and isinstance(value.get("text"), str) and _encodable(value["text"]):
        return value["text"]
    return text

  def _open(self, file: FoundFile):
    from array_record.python import array_record_module  # only who reads such files pays for the import

    try:
      return array_record_module.ArrayRecordReader(str(file.path), self._RANDOM_ACCESS)
    except RuntimeError as error:
      raise self._corrupt(file, error) from None

  def _corrupt(self, file: FoundFile, error: Exception) -> ConfigError:
    fault = " ".join(str(error).split())
    return ConfigError("data.sources", self.spec, f"ArrayRecord files that are whole ({file.name!r}: {fault})")
