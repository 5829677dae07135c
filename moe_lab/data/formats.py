"""Files as documents: text, JSONL and ArrayRecord, each read once in full when opened and by position afterwards.

The first reading checks every document, so a broken one stops the program before a step is taken, not in hour ten; or
is left out there and then, and counted. Only positions stay in memory (and, while it is checked, one file).
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.errors import ConfigError

_PLACES = 5  # of what was left out, that are named

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


class Corrupt(ConfigError):
  """A file, or a document in it, that cannot be read.

  Attributes:
    file: its name.
    reason: in a few words, the same for all that are broken alike.
    place: where it is and what is wrong there.
  """

  def __init__(self, spec: str, wanted: str, file: str, reason: str, place: str):
    super().__init__("data.sources", spec, f"{wanted} ({place})")
    self.file, self.reason, self.place = file, reason, place

  def __reduce__(self):
    return ConfigError, self._parts


class Skipped:
  """What of a source was left out."""

  def __init__(self):
    self._counts: Counter[tuple[str, str]] = Counter()  # (file, reason)
    self._first: list[str] = []

  def add(self, error: Corrupt) -> None:
    self._counts[error.file, error.reason] += 1
    self._first += [error.place] if len(self._first) < _PLACES else []

  @property
  def count(self) -> int:
    return self._counts.total()

  def manifest(self) -> dict:
    """Returns how many, how many by file and reason, and the first places."""
    by_reason = [{"file": file, "reason": reason, "count": n} for (file, reason), n in self._counts.items()]
    return {"skipped": self.count, "skipped_by_reason": by_reason, "skipped_first": self._first}

  def __str__(self) -> str:
    more = f", and {self.count - len(self._first)} more" if self.count > len(self._first) else ""
    return f"{self.count} left out: {'; '.join(self._first)}{more}"


class DocumentSource:
  """Random access to the documents of a source; the order is that of the files' names.

  Attributes:
    spec: the entry of `config.data.sources`.
    skipped: what was left out.
  """

  def __init__(self, spec: str, files: list[FoundFile], *, license: str | None = None, skip: bool = False):
    """Reads all files.

    Args:
      spec: the entry of `config.data.sources`.
      files: to read.
      license: of all of them, for the manifest.
      skip: whether what cannot be read is left out; otherwise it is an error.
    """
    self.spec, self.skipped = spec, Skipped()
    self._files, self._skip = files, skip
    self._positions: list[tuple[int, Any]] = []  # per document: the file's index, and the place in it
    self._manifest = []
    for index, file in enumerate(files):
      data = self._sound(lambda file=file: readable(spec, file.path, file.name))
      if data is not None:
        self._positions += [(index, place) for place in self._scan(file, data)]
      sha256, size = (None, None) if data is None else (hashlib.sha256(data).hexdigest(), len(data))
      self._manifest.append({"file": file.name, "sha256": sha256, "bytes": size, "license": license})
    if not self._positions:
      left_out = f"; {self.skipped}" if self.skipped.count else ""
      wanted = f"at least one document that is not empty ({len(files)} file(s) read{left_out})"
      raise ConfigError("data.sources", spec, wanted)

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> Document:
    file_index, place = self._positions[index]
    return self._read(self._files[file_index], place)

  def digest(self) -> str:
    """Returns a SHA-256 of where the documents are: with the files' own it says which were left out."""
    return hashlib.sha256(repr(self._positions).encode()).hexdigest()

  def manifest(self) -> list[dict]:
    """Returns a {file, sha256, bytes, license} for each file; `license` is an SPDX name, or None if unknown."""
    return self._manifest

  def _scan(self, file: FoundFile, data: bytes) -> Iterator[Any]:
    """Yields the place of each document in a file; one that is not `_sound` has none."""
    raise NotImplementedError

  def _sound(self, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns; where that is Corrupt and may be left out, counts it and returns None."""
    try:
      return read()
    except Corrupt as error:
      if not self._skip:
        raise
      self.skipped.add(error)
      return None

  def _read(self, file: FoundFile, place: Any) -> Document:
    """Returns the document at a place."""
    raise NotImplementedError

  def _decode(self, file: FoundFile, data: bytes, offset: int = 0, part: str = "") -> str:
    """Returns the text of bytes at an offset in a file, or in a part of it."""
    try:
      return data.decode("utf-8")
    except UnicodeDecodeError as error:
      where = f"{file.name + part!r} has an invalid byte at offset {offset + error.start}"
      raise Corrupt(self.spec, "UTF-8 text", file.name, "is not UTF-8", where) from None


def readable(spec: str, path: Path, name: str = "") -> bytes:
  """Returns a file's bytes; one that the system refuses is the user's error."""
  try:
    return path.read_bytes()
  except OSError as error:
    where = f"{str(path)!r}: {error.strerror}"
    raise Corrupt(spec, "files that can be read", name or str(path), "cannot be read", where) from None


class TextFiles(DocumentSource):
  """A document a file; files over `MAX_TEXT_BYTES` are cut at line ends into documents of about that size."""

  def _scan(self, file, data):
    if self._sound(lambda: self._decode(file, data)) is None:
      return
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
      at = file, line, start, number
      if line.strip() and self._sound(lambda at=at: self._text(*at)):
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
      reason, fault = "is not JSON", f"is not JSON: {getattr(error, 'msg', error)}"
    else:
      if not isinstance(value, dict):
        reason = fault = "is not an object"
      else:
        found, fault = self._field(value)
        reason = "has not the right fields"
        if found is not None and not _encodable(found):
          found, reason = None, "has half of a surrogate pair in its text"
          fault = reason
    if found is None:
      raise Corrupt(self.spec, self.wanted, file.name, reason, f"{file.name!r} line {number} {fault}")
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
    found = self._sound(lambda: self._counted(file))
    if found is None:
      return
    reader, count = found
    for index in range(count):
      if self._sound(lambda index=index: self._text(file, self._record(file, reader, index), index)):
        yield index
    reader.close()

  def _counted(self, file: FoundFile) -> tuple[Any, int]:
    """Returns a reader and its number of records."""
    reader = self._open(file)
    try:
      count = reader.num_records() if reader.ok() else 0
    except RuntimeError as error:
      raise self._corrupt(file, error) from None
    if not count:
      raise self._corrupt(file, "it holds no records, or has lost its end")
    return reader, count

  def _record(self, file: FoundFile, reader: Any, index: int) -> bytes:
    try:
      return reader.read([index])[0]
    except (RuntimeError, IndexError) as error:
      raise self._corrupt(file, error, f"[{index}]") from None

  def _read(self, file, place):
    readers = self.__dict__.setdefault("_readers", {})  # opening one reads its index: once
    if file.name not in readers:
      readers[file.name] = self._open(file)
    record = self._record(file, readers[file.name], place)
    return Document(f"{file.name}[{place}]", self._text(file, record, place))

  def _text(self, file: FoundFile, record: bytes, index: int) -> str:
    text = self._decode(file, record, part=f"[{index}]")
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

  def _corrupt(self, file: FoundFile, error: Exception | str, part: str = "") -> Corrupt:
    place = f"{file.name + part!r}: {' '.join(str(error).split())}"
    return Corrupt(self.spec, "ArrayRecord files that are whole", file.name, "is no whole ArrayRecord", place)
