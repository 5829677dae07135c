"""Checkpoints: a whole training state and its JSON side, kept by Orbax.

Orbax alone casts silently when a dtype has changed, takes an empty directory
for the newest step, reads numbers that have changed on the disk, and tells
nobody when a save in the background fails. The differences are made up here.
"""

import itertools
import logging
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_lab.errors import RunError, UserError
from moe_lab.io import hosts
from moe_lab.io.digests import changed, digest_of, digests_of
from moe_lab.io.files import jsonable

_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a step's directory until it is whole
_DAMAGED = ".damaged"  # in the name of a step's directory that was set aside


def in_host_memory(abstract_state: object) -> object:
  """Returns for `restore` what makes every leaf an array of numpy, never on a device; it takes no memory itself."""
  return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), abstract_state)


class Damaged(UserError):
  """A checkpoint that cannot be read as it was written; `what` and why, in words."""

  def __init__(self, what: str, instead: str):
    super().__init__(f"{what}: {instead}")
    self.what = what


def saved_steps(workdir: Path) -> list[int]:
  """Returns the steps with a checkpoint under `workdir`, ascending.

  Read from the disk each time: Orbax's own list also holds steps whose save
  has failed or is not finished. A step's directory gets its name when whole.
  """
  return sorted(int(path.name) for path in _step_folders(workdir) if any(path.iterdir()))


class Checkpointer:
  """Saves and restores the states of one run.

  Saves run in the background; `wait` (or the next `save`, or `close`) reports
  the failure. A writer clears what killed saves left behind, so there must be
  only one: hold the run's lock. A reader (`keep=None`) changes nothing and may
  look on while a run trains.

  On several hosts every process has one and calls it at the same points: each
  writes and reads the shards of its own devices. The first process clears, and
  says which steps there are.
  """

  def __init__(self, workdir: Path, keep: int | None):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: the run's directory.
      keep: how many of the newest checkpoints to keep; None opens for reading only.
    """
    self._workdir = Path(workdir).absolute()
    self._folder = self._workdir / "checkpoints"
    self._keep = keep
    self._mine: set[int] = set()  # steps saved or restored here: on disk exactly as this process has them
    self._pending: int | None = None  # the step that is being saved
    hosts.from_first(self._clear)
    if keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    else:
      # Where a directory cannot be made, Orbax's threads wait five minutes for one made in the background.
      in_front = ocp.AsyncOptions(create_directories_asynchronously=False)
      options = ocp.CheckpointManagerOptions(async_options=in_front)
    self._manager = ocp.CheckpointManager(self._folder, options=options) if self._folder.is_dir() else None

  def save(self, step: int, state: object, meta: dict) -> None:
    """Starts saving `state` as `step`; returns once the arrays are copied, so they may be donated.

    A step that this process has saved or restored is not written again; one
    left by an abandoned continuation is replaced.

    Args:
      step: number of finished steps.
      state: pytree of arrays.
      meta: JSON that belongs to it (position of the data, fingerprint, ...).

    Raises:
      RunError: this save, or the one before it, failed.
    """
    assert self._keep is not None, "opened for reading"
    self.wait()  # so that an error is of this step
    if step in self._mine:
      return
    side = {"meta": jsonable(meta), "leaves": _leaves(state), "digests": digests_of(state)}
    side |= {"digest": digest_of(side)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(side))
    self._pending = step
    try:
      if step in self.steps():
        self._remove([step])
      # Forced, for Orbax skips without a word a step that is not above its newest.
      self._manager.save(step, args=items, force=True)
    except Exception as err:  # whatever the storage raises
      raise self._failure(err) from err

  def restore(self, abstract_state: object, step: int | None = None) -> tuple[object, dict, int]:
    """Reads a checkpoint.

    Args:
      abstract_state: pytree like the saved one, of arrays or `jax.ShapeDtypeStruct`;
        a leaf's sharding is where it goes, by default this process's first device; for an array of numpy it is one
        of numpy (`in_host_memory`).
      step: which; None for the newest that is whole. A writer sets those that are not aside.

    Returns:
      (state, meta, step): the saved arrays bit for bit.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it does not fit `abstract_state`.
    """
    self.wait()
    steps = self.steps()
    if not steps:
      raise UserError(f"no checkpoint under {self._folder}: train it first")
    if step is not None:
      if step not in steps:
        raise UserError(f"no checkpoint of step {step} under {self._folder}: it has {', '.join(map(str, steps))}")
      return self._restore(abstract_state, step)
    while True:
      step = steps.pop()
      try:
        return self._restore(abstract_state, step)
      except Damaged as error:
        if not steps:
          raise
        kept = ""
        if self._keep is not None:
          kept = f"; it is kept as {self._set_aside(step)}"
        logging.warning("%s: going back to step %d%s", error.what, steps[-1], kept)

  def _restore(self, abstract_state: object, step: int) -> tuple[object, dict, int]:
    if self._keep is None:
      self._manager.reload()  # the run may have gone on since
    side = self._read(step, meta=ocp.args.JsonRestore()).meta
    if isinstance(side, dict) and side.keys() == {"meta", "leaves"}:
      where = self._folder / str(step)
      raise UserError(f"the checkpoint {where} is of an earlier version of this program, which wrote no digests")
    if not isinstance(side, dict) or side.pop("digest", "") != _digest_or_none(side):
      raise self._damaged(step, "its meta item is not as it was written")
    self._check_fit(step, side["leaves"], _leaves(abstract_state))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # Left to itself Orbax looks for the devices that have saved it.
    placed = jax.tree.map(
      lambda leaf: leaf.update(sharding=here) if getattr(leaf, "sharding", here) is None else leaf, abstract_state
    )
    state = self._read(step, state=ocp.args.StandardRestore(placed)).state
    other = changed(state, side["digests"])
    if not hosts.all_hold(other is None):
      raise self._damaged(step, f"{other or 'a part on another host'} is not as it was written")
    self._mine.add(step)
    return state, side["meta"], step

  def steps(self) -> list[int]:
    """Returns the steps that can be restored, ascending."""
    return hosts.from_first(lambda: saved_steps(self._workdir))

  def latest_step(self) -> int | None:
    return max(self.steps(), default=None)

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      RunError: a save failed.
    """
    if self._pending is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as err:  # whatever the storage raises
      raise self._failure(err) from err
    step, self._pending = self._pending, None
    self._mine.add(step)
    # Later steps are of a continuation that was abandoned: left there, the next launch would resume from one.
    steps = self.steps()
    older = [other for other in steps if other < step]
    later = [other for other in steps if other > step]
    try:
      self._remove(later + older[: max(0, len(older) + 1 - self._keep)])
    except OSError as err:
      raise RunError(
        f"{self._folder} cannot be cleared of old steps ({err.strerror or err}); step {step} is good"
      ) from err

  def close(self) -> None:
    """Waits, then lets go. Raises as `wait` does."""
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _clear(self) -> None:
    for path in _step_folders(self._workdir):
      if not any(path.iterdir()):
        logging.warning("ignoring %s: an empty checkpoint", path)
        if self._keep is not None:
          path.rmdir()  # Orbax would count it as a step
    if self._keep is not None:
      try:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(f"*{_TEMPORARY}*"):
          shutil.rmtree(path)
      except OSError as err:
        raise UserError(f"{self._folder} cannot be written: {err.strerror or err}") from err

  def _remove(self, steps: list[int]) -> None:
    def remove() -> None:
      for step in steps:
        # Under another name first: Orbax deletes in place, and killed at it leaves half a checkpoint that looks whole.
        doomed = self._folder / f"{step}{_TEMPORARY}-removed"
        (self._folder / str(step)).rename(doomed)
        shutil.rmtree(doomed)

    if steps:
      hosts.from_first(remove)
      self._mine.difference_update(steps)
      self._manager.reload()

  def _set_aside(self, step: int) -> str:
    """Gives a step's directory a name that is no step's, and returns it."""

    def rename() -> str:
      free = (f"{step}{_DAMAGED}{number or ''}" for number in itertools.count())
      name = next(name for name in free if not (self._folder / name).exists())
      (self._folder / str(step)).rename(self._folder / name)
      return name

    name = hosts.from_first(rename)
    self._manager.reload()
    return name

  def _read(self, step: int, **items: object) -> ocp.args.Composite:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as err:  # a damaged file shows up as nearly any type
      # Orbax's own words name an index and an object's address; the array and the reason are beneath.
      raise self._damaged(step, _first_line(err.__cause__ or err)) from err

  def _damaged(self, step: int, why: str) -> Damaged:
    others = [str(s) for s in saved_steps(self._workdir) if s != step]
    instead = f"ask for step {' or '.join(others)}, or " if others else ""
    where = self._folder / str(step)
    return Damaged(f"the checkpoint {where} cannot be read ({why})", f"{instead}remove that directory")

  def _check_fit(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
    where = f"the checkpoint {self._folder / str(step)}"
    # Shortest first: the parameter itself, rather than the optimizer's moments of it.
    for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (len(name), name)):
      if saved.get(name) != wanted.get(name):
        raise UserError(
          f"{where} has {saved.get(name, 'nothing')} for {name}, and the model wants"
          f" {wanted.get(name, 'nothing')}: give it the configuration of its run"
        )

  def _failure(self, err: Exception) -> RunError:
    step, self._pending = self._pending, None
    last = max(saved_steps(self._workdir), default=None)
    good = "there is no good step" if last is None else f"the last good step is {last}"
    return RunError(f"saving step {step} under {self._folder} failed ({_first_line(err)}): {good}")


def _step_folders(workdir: Path) -> list[Path]:
  try:
    return [path for path in (Path(workdir) / "checkpoints").iterdir() if path.name.isdecimal() and path.is_dir()]
  except (FileNotFoundError, NotADirectoryError):
    return []


def _leaves(tree: object) -> dict[str, str]:
  """Returns "dtype[shape]" by leaf name, as ".params['embed']": "float32[64, 8]"."""
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    found[jax.tree_util.keystr(path)] = f"{leaf.dtype}{list(leaf.shape)}"
  return found


def _digest_or_none(side: dict) -> str | None:
  try:
    return digest_of(side)
  except RecursionError:  # nothing that was written is nested so deeply
    return None


def _first_line(err: BaseException) -> str:
  # TensorStore's messages hold paths and source locations, and the reason far behind.
  reason = re.search(r": ([^:\n]*) \[os_error_code=", str(err))
  if reason:
    return reason[1]
  text = str(err).strip().splitlines()
  return f"{type(err).__name__}: {text[0][:300]}" if text else type(err).__name__


def _is_news(record: logging.LogRecord) -> bool:
  """False for what Orbax logs and the user need not read.

  It logs the trace of a failed save, some 150 lines, and then raises the error,
  which becomes one line here; and that a directory opened for reading is so.
  """
  of_orbax = "/orbax/checkpoint/" in record.pathname
  return not (of_orbax and (record.exc_info or "read only" in str(record.msg)))


def _is_not_of_a_failed_save(record: logging.LogRecord) -> bool:
  """False for the traces of a failed save's other writes, one for each array, that asyncio has nobody to raise at."""
  error = record.exc_info[1] if record.exc_info else None
  return "OCDBT database" not in str(error)


def _ignore_abandoned_reads(unraisable) -> None:
  """As the hook before, but silent about the other reads of a checkpoint when one has failed.

  Orbax leaves them as they are: TensorStore's threads tell a loop that is closed, and a read that is collected half way
  raises anew, with a trace, at any time later.
  """
  closed = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
  code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
  if not closed and not (code and "/orbax/checkpoint/" in code.co_filename):
    _hook_before(unraisable)


logging.getLogger("absl").addFilter(_is_news)
logging.getLogger("asyncio").addFilter(_is_not_of_a_failed_save)
_hook_before, sys.unraisablehook = sys.unraisablehook, _ignore_abandoned_reads
