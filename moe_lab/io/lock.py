"""One process at a time in a run's directory."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from moe_lab.errors import UserError
from moe_lab.strict_json import parse

# The scheduler's name for the job that this process belongs to, the same for every attempt at it. Launchers set it.
JOB = "MOE_LAB_JOB"
_LEAVING = 60.0  # seconds that an earlier attempt, which the scheduler has given up, has to be gone
_LOOK = 0.5  # seconds between two looks at it


class RunLock:
  """The file `lock` of a run: held from construction until `release`.

  It names its holder (host, pid, a random token). A holder on this host whose
  process is gone is stale, and its lock is taken over; of a holder on another
  host nothing can be known, so it is believed. Unless it is an earlier attempt
  of our own job: a scheduler begins the next one only when it has declared the
  one before dead, with its node or alone. On this host, it may take that one
  some seconds to be gone, which are waited for.

  Raises:
    UserError: another process holds it.
    OSError: the directory cannot be written.
  """

  def __init__(self, workdir: Path):
    self._path = workdir / "lock"
    self._token = secrets.token_hex(8)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "token": self._token}
    mine["job"] = os.environ.get(JOB)
    deadline = time.monotonic() + _LEAVING
    while _retried(holder := _read(self._path), mine) and _here(holder) and _alive(holder):
      if time.monotonic() > deadline:
        break
      time.sleep(_LOOK)
    # Between finding a lock stale and removing it, another process may have taken it over: hence one at a time.
    with _alone(workdir):
      holder = _read(self._path)
      if holder is not None:
        if _alive(holder) and (_here(holder) or not _retried(holder, mine)):
          raise UserError(
            f"{workdir} is in use by process {holder.get('pid')} on {holder.get('host')}:"
            f" wait for it, use another --workdir, or remove {self._path} if that process is gone"
          )
        self._path.unlink(missing_ok=True)
      with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
        json.dump(mine, file)

  def release(self) -> None:
    """Gives the directory back; harmless when it is no longer ours, or gone."""
    with contextlib.suppress(OSError):
      if (_read(self._path) or {}).get("token") == self._token:
        self._path.unlink()


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
  """Holds the kernel's lock on the directory, where its file system has one."""
  handle = os.open(workdir, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as err:
      if err.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
        raise
    yield
  finally:
    os.close(handle)


def _read(path: Path) -> dict | None:
  """Returns the holder that the file names: {} when it was cut short, None when there is no file."""
  try:
    holder = parse(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}


def _retried(holder: dict | None, mine: dict) -> bool:
  """Returns whether the holder is another attempt at the job that this process belongs to."""
  return bool(holder and mine["job"] and holder.get("job") == mine["job"])


def _alive(holder: dict) -> bool:
  if not isinstance(holder.get("pid"), int):
    return False  # killed while it wrote the file
  if not _here(holder):
    return True
  try:
    os.kill(holder["pid"], 0)
  except ProcessLookupError:
    return False
  except OverflowError:
    return False  # no process has such a number
  except OSError:
    pass  # it exists and is somebody else's
  born = _born(holder["pid"])
  return born is None or holder.get("born") is None or born == holder["born"]


def _here(holder: dict) -> bool:
  return holder.get("host") == socket.gethostname()


def _born(pid: int) -> int | None:
  """Returns when a process started, in clock ticks since boot; it tells a holder from a later process of its number."""
  try:
    stat = Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # The second field, the program's name, may itself hold spaces and brackets.
  fields = stat.rpartition(")")[2].split()
  return None if fields[0] == "Z" else int(fields[19])
