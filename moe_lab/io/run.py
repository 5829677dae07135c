"""A run's directory: who may write in it, what it holds, what made it.

config.json    the resolved configuration
run.json       code, versions, devices, command, data, and one entry per launch
lock           the process that is writing, while it is
metrics.jsonl  tensorboard/  checkpoints/  evaluation.json  report.html
imported/      the files that came with a checkpoint of somebody else's
"""

import dataclasses
import datetime
import os
import shlex
from pathlib import Path

from moe_lab.config.resolve import FIELDS, diff, from_json, to_json
from moe_lab.config.schema import Config
from moe_lab.errors import UserError, did_you_mean
from moe_lab.io import hosts, record
from moe_lab.io.checkpoint import saved_steps
from moe_lab.io.files import dump_json, write_text
from moe_lab.io.lock import RunLock
from moe_lab.strict_json import parse

CARRIED = "imported"
# What may change when a run is continued: how often it reports and where it runs, not what it computes.
_CADENCE = {
  f"train.{name}" for name in ("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")
}
_MAY_CHANGE = _CADENCE | {field for field in FIELDS if field.startswith("mesh.")}


@dataclasses.dataclass
class Run:
  """An open run; close it, or use it as a context manager, to give the directory back.

  Attributes:
    workdir: its directory.
    config: the configuration of this launch.
    info: what run.json holds.
    resumed: whether the directory held this run before.
  """

  workdir: Path
  config: Config
  info: dict
  resumed: bool
  _lock: RunLock | None  # None in the processes that do not write

  def note(self, **fields: object) -> None:
    """Adds fields to run.json: what only shows while running, such as the back end that `auto` chose."""
    self.info.update(fields)
    if self._lock is not None:
      write_text(self.workdir / "run.json", dump_json(self.info, indent=2) + "\n")

  def close(self) -> None:
    if self._lock is not None:
      self._lock.release()

  def __enter__(self) -> "Run":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def open_run(workdir: Path, config: Config, *, fingerprint: str, manifest: list[dict], argv: list[str]) -> Run:
  """Starts a run in `workdir`, or continues the one that it holds; of several processes only the first writes.

  Args:
    workdir: its directory; made when absent.
    config: resolved configuration.
    fingerprint: of the tokenizer (hexadecimal).
    manifest: the data files, one dict each.
    argv: the command, as in `sys.argv`.

  Raises:
    UserError: the directory is in use, holds something else, or holds a run with
      another configuration or tokenizer. Nothing in it was changed. Or the hosts do not share it.
  """
  workdir, opened = Path(workdir), []

  def open_here() -> bool:
    opened.append(_open(workdir, config, fingerprint, manifest, argv))
    return opened[0].resumed

  resumed = hosts.from_first(open_here)
  run = opened[0] if opened else Run(workdir, config, {}, resumed, None)
  if not hosts.all_hold((workdir / "lock").exists()):
    run.close()
    raise UserError(f"--workdir={workdir}: wanted a folder that all hosts share; some do not see what process 0 wrote")
  return run


def _open(workdir: Path, config: Config, fingerprint: str, manifest: list[dict], argv: list[str]) -> Run:
  _check_place(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(workdir)
  except OSError as err:
    raise UserError(f"--workdir={workdir} cannot be written: {err.strerror or err}") from err
  try:
    resumed = (workdir / "config.json").exists()
    if resumed:
      old_config, info = load_run(workdir)
      _check_same(workdir, old_config, config, info, fingerprint)
    else:
      info = {
        **record.code(),
        **record.machine(),
        "versions": record.versions(),
        "command": shlex.join(argv),
        "started": _now(),
        "data": manifest,
        "tokenizer_fingerprint": fingerprint,
        "launches": [],
      }
    step = max(saved_steps(workdir), default=0)
    info.setdefault("launches", []).append(
      {
        "step": step,
        "argv": argv,
        "started": _now(),
        **record.code(),
        **record.machine(),
        "versions": record.versions(),
      }
    )
    run = Run(workdir, config, info, resumed, lock)
    run.note()
    # Last: a run exists once its config.json does.
    write_text(workdir / "config.json", to_json(config).rstrip("\n") + "\n")
  except OSError as err:
    lock.release()
    raise UserError(f"--workdir={workdir} cannot be written: {err.strerror or err}") from err
  except BaseException:
    lock.release()
    raise
  return run


def load_run(workdir: Path) -> tuple[Config, dict]:
  """Reads the configuration of a run and its run.json; changes nothing, needs no lock.

  Raises:
    UserError: there is no run there, or its files cannot be read.
  """
  workdir = Path(workdir)
  if not os.path.isfile(workdir / "config.json"):  # False also for a name that no folder can have
    raise UserError(f"no run in {workdir}{_nearest_run(workdir)}")
  paths = workdir / "config.json", workdir / "run.json"
  try:
    text, info_text = (path.read_text(encoding="utf-8") for path in paths)
    info = parse(info_text)
    _check_info(info)
  except (OSError, ValueError) as err:
    raise UserError(f"the run in {workdir} cannot be read: {err}") from err
  return from_json(text, source=str(paths[0])), info


def _check_info(info: object) -> None:
  """Raises ValueError unless run.json has the form that its readers rely on."""
  if not isinstance(info, dict):
    raise ValueError("run.json: wanted an object")
  for name, kind in (("tokenizer_fingerprint", str), ("started", str), ("command", str), ("imported", dict)):
    if not isinstance(info.get(name, kind()), kind):
      raise ValueError(f"run.json: {name}: wanted {'text' if kind is str else 'an object'}")
  for name in ("data", "devices", "launches"):
    entries = info.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
      raise ValueError(f"run.json: {name}: wanted a list of objects")


def is_finished(workdir: Path, config: Config) -> bool:
  """Returns whether `workdir` holds this very run, trained and evaluated to the end.

  A run of another configuration is not finished: `train` then says in which field it differs.
  """
  return (workdir / "evaluation.json").is_file() and load_run(workdir)[0] == config


def _check_place(workdir: Path) -> None:
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"--workdir={workdir} is a file: wanted a directory")
  if workdir.is_dir() and not (workdir / "config.json").exists():
    # A launch killed before its config.json leaves these, and may start again.
    others = sorted(p.name for p in workdir.iterdir() if p.name not in ("lock", "run.json") and p.suffix != ".tmp")
    if others:
      raise UserError(
        f"--workdir={workdir} holds other files ({others[0]}, ...) and no run: wanted a new or empty directory"
      )


def check_config(workdir: Path, config: Config) -> None:
  """Raises UserError where `workdir` holds a run that `config` cannot go on with."""
  if (workdir / "config.json").is_file():
    _check_same_config(workdir, load_run(workdir)[0], config)


def _check_same_config(workdir: Path, old: Config, new: Config) -> None:
  changed = [entry for entry in diff(old, new) if entry[0] not in _MAY_CHANGE]
  if changed:
    field, was, is_now = changed[0]
    more = f" (and {', '.join(name for name, _, _ in changed[1:])})" if changed[1:] else ""
    raise UserError(
      f"config.{field} = {is_now!r}, but the run in {workdir} has {was!r}{more}:"
      " use another --workdir, or the same values"
    )


def _check_same(workdir: Path, old: Config, new: Config, info: dict, fingerprint: str) -> None:
  _check_same_config(workdir, old, new)
  was = info.get("tokenizer_fingerprint")
  if was != fingerprint:
    raise UserError(
      f"tokenizer {fingerprint[:12]} is not {str(was)[:12]}, with which the run in {workdir} was trained:"
      " use another --workdir, or the same tokenizer and data"
    )


def _nearest_run(workdir: Path) -> str:
  """Returns what to suggest instead of `workdir`: a run inside it, or one beside it with a similar name."""
  if not os.path.exists(workdir) and not os.path.isdir(workdir.parent):
    return ": no such directory"
  inside = _runs_in(workdir)
  if inside:
    return f"; it holds the runs {', '.join(inside[:4])}{', ...' if inside[4:] else ''}"
  near = did_you_mean(workdir.absolute().name, _runs_in(workdir.absolute().parent))
  return near or ": train one first (python -m experiments.train)"


def _runs_in(folder: Path) -> list[str]:
  try:
    return sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file() and (p / "run.json").is_file())
  except (OSError, ValueError):  # the second of a name that no folder can have
    return []


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
