"""Metrics of a run: metrics.jsonl, the source of truth, and TensorBoard beside it."""

import contextlib
import json
import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from moe_lab.errors import RunError, UserError
from moe_lab.io.files import dump_json, write_text
from moe_lab.strict_json import parse

_FLUSH_SECONDS = 10.0  # between TensorBoard's updates; each waits for the disk


class MetricsWriter:
  """Appends records to `workdir/metrics.jsonl` and their scalars to `workdir/tensorboard/`.

  A record is a flat dict with a `kind` ("train", "eval", ...), a `step`, and
  numbers, arrays or strings. Each line is on its way to the disk when `write`
  returns. Not a number is written as null.
  """

  def __init__(self, workdir: Path):
    self._path = Path(workdir) / "metrics.jsonl"
    self._events_folder = Path(workdir) / "tensorboard"
    self._events: EventsWriter | None = None
    self._flushed = 0.0  # monotonic seconds
    self._purge_from: int | None = None
    text = _read(self._path)
    if text and not text.endswith("\n"):
      # A killed process left half a line; appended to, it would spoil a good record as well.
      write_text(self._path, text[: text.rfind("\n") + 1])
    self._file = self._path.open("a", encoding="utf-8", newline="\n")

  def resume(self, step: int) -> None:
    """Drops the records after `step`, which the run is about to write again."""
    self._file.close()
    kept = [record for record in _parse(self._path, _read(self._path)) if record.get("step", 0) <= step]
    write_text(self._path, "".join(dump_json(record) + "\n" for record in kept))
    self._file = self._path.open("a", encoding="utf-8", newline="\n")
    self._purge_from = step + 1

  def write(self, record: dict) -> None:
    """Appends one record.

    Raises:
      RunError: the disk is full, or the like.
    """
    line = dump_json(record)
    try:
      self._file.write(line + "\n")
      self._file.flush()
      self._write_events(json.loads(line))
    except OSError as err:
      raise RunError(f"{self._path} cannot be written: {err.strerror or err}") from err

  def close(self) -> None:
    # A disk that is full has been reported by `write`.
    with contextlib.suppress(OSError):
      self._file.close()
    with contextlib.suppress(OSError):
      if self._events is not None:
        self._events.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _write_events(self, record: dict) -> None:
    # tensorboardX's SummaryWriter writes from a thread: with the disk full the thread dies, and the
    # program waits for ever at its queue. So events are written here, by the part below it.
    if self._events is None:
      self._events_folder.mkdir(exist_ok=True)
      self._events = EventsWriter(str(self._events_folder / "events"), filename_suffix=f".{os.getpid()}")
      if self._purge_from is not None:
        # TensorBoard then hides what earlier processes wrote from this step on.
        self._send(step=self._purge_from, session_log=SessionLog(status=SessionLog.START))
    kind = record.get("kind", "other")
    values = [
      Summary.Value(tag=f"{kind}/{name}", simple_value=value)
      for name, value in record.items()
      if name not in ("kind", "step") and isinstance(value, (int, float))
    ]
    self._send(step=record.get("step", 0), summary=Summary(value=values))
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self._events.flush()
      self._flushed = time.monotonic()

  def _send(self, **fields: object) -> None:
    self._events.write_event(Event(wall_time=time.time(), **fields))


class NoWriter:
  """Takes the place of `MetricsWriter` in the processes that do not write."""

  def resume(self, step: int) -> None:
    pass

  def write(self, record: dict) -> None:
    pass

  def __enter__(self) -> "NoWriter":
    return self

  def __exit__(self, *_) -> None:
    pass


def read_metrics(workdir: Path) -> list[dict]:
  """Returns the records of a run in the order written; none when it has no metrics.jsonl.

  A last line without its end is left out: its writer was killed, or is at it.

  Raises:
    UserError: another line is not a record.
  """
  path = Path(workdir) / "metrics.jsonl"
  return _parse(path, _read(path))


def _read(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8", errors="replace")
  except FileNotFoundError:
    return ""


def _parse(path: Path, text: str) -> list[dict]:
  records = []
  for number, line in enumerate(text.split("\n")[:-1], 1):
    try:
      record = parse(line)
    except ValueError:
      record = None
    if not isinstance(record, dict):
      raise UserError(f"{path}, line {number}: wanted a JSON object, got {line[:40]!r}")
    if not isinstance(record.get("kind", ""), str) or not isinstance(record.get("step", 0), int | float):
      raise UserError(f"{path}, line {number}: wanted a kind and a step, got {line[:40]!r}")
    records.append(record)
  return records
