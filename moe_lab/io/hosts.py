"""The processes of a run on several hosts: how they meet, agree, and leave.

Every process runs the same program on its own devices. Process 0 writes what a run writes; what decides (which step to
restore, whether the directory is free) is found out by process 0 and told to the others, so that no two hosts' views of
a file system can differ. All functions here but `joined` are for all processes at the same point of the program; with
one process they do nothing.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_lab.config import program
from moe_lab.config.hosts import Hosts
from moe_lab.errors import RunError, UserError

T = TypeVar("T")
_GRACE = 3600  # seconds
_LAST_WORDS = 3.0  # seconds


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
  """Joins the other processes, if there are any; comes before anything that asks jax for devices.

  An error within ends this process at once, without the goodbyes at which it would wait for others that wait for it.
  When process 0, which has the coordinator, is gone the others end; when another is, they do after `heartbeat_timeout`.

  Raises:
    UserError: they cannot meet. Not all there in time: one line and exit 2 from here.
  """
  if not _connect(hosts):
    yield
    return
  try:
    yield
  except SystemExit:
    raise
  except BaseException as error:
    code = program.explain(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
      time.sleep(_LAST_WORDS)  # an error that all share is still to be said by all
    os._exit(code)


def is_first() -> bool:
  """Returns whether this is the process that writes."""
  return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
  """Returns what `make` returns on process 0, the only one to call it, to every process; None, or anything of JSON's.

  Raises:
    UserError: `make` has raised it; on all processes.
  """
  if jax.process_count() == 1:
    return make()
  told = {}
  if is_first():
    try:
      told = {"value": make()}
    except UserError as error:
      told = {"error": str(error), "failed": isinstance(error, RunError)}
  told = json.loads(_broadcast(json.dumps(told)))
  if "error" in told:
    raise (RunError if told["failed"] else UserError)(told["error"])
  return told["value"]


@contextlib.contextmanager
def first_ahead() -> Iterator[None]:
  """Process 0 goes through the body first, and what it has left on the disk is there for the others."""
  if not is_first():
    _wait()
  try:
    yield
  finally:
    if is_first():
      _wait()


def all_hold(true: bool) -> bool:
  """Returns whether it is so on all processes."""
  return bool(np.all(multihost_utils.process_allgather(np.asarray(true))))


def from_all(text: str) -> list[str]:
  """Returns what each process has to say, in their order."""
  if jax.process_count() == 1:
    return [text]
  mine = np.frombuffer(text.encode(), np.uint8)
  size_P = multihost_utils.process_allgather(np.int32(mine.size))
  sent = np.zeros(_room(int(np.max(size_P))), np.uint8)
  sent[: mine.size] = mine
  sent_PN = np.reshape(multihost_utils.process_allgather(sent), (-1, sent.size))
  return [row[:size].tobytes().decode() for row, size in zip(sent_PN, np.ravel(size_P), strict=True)]


def check_same(what: str, value: object) -> None:
  """Raises UserError, on all processes, unless `value` (of JSON's types) is the same on all."""
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest(), np.uint8)
  digests = np.reshape(multihost_utils.process_allgather(digest), (-1, digest.size))
  others = np.flatnonzero((digests != digests[0]).any(1))
  if others.size:
    raise UserError(f"{what}: process {others[0]} has something else than process 0: wanted the same on every host")


def _connect(hosts: Hosts) -> bool:
  """Returns whether there are other processes; they are connected then."""
  explicit = hosts.coordinator_address is not None
  if not explicit and (hosts.num_processes == 1 or _on_cluster() <= 1):
    return False
  # jax answers processes that do not come by an abort and a stack trace, so its own time-out is put out of reach.
  late = threading.Timer(hosts.initialization_timeout, _give_up, (hosts,))
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      hosts.coordinator_address,
      hosts.num_processes,
      hosts.process_id,
      cluster_detection_method="deactivate" if explicit else None,
      initialization_timeout=hosts.initialization_timeout + _GRACE,
      heartbeat_timeout_seconds=hosts.heartbeat_timeout,
    )
  except (RuntimeError, ValueError, OSError) as error:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"the processes cannot meet: {first}") from error
  finally:
    late.cancel()
  return True


def _on_cluster() -> int:
  """Returns the number of processes that the cluster around this one has started; 1 where there is none.

  The answer is jax's own, of the clusters that `jax.distributed.initialize` knows.
  """
  from jax._src.clusters import ClusterEnv

  try:
    # Only the pods of an indexed job are one run; whoever is alone in a cluster needs no permission to look about.
    known = [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]
    if "JOB_COMPLETION_INDEX" not in os.environ:
      known = [c for c in known if c.__name__ != "K8sCluster"]
    cluster = next((c for c in known if c.is_env_present()), None)
    if cluster is None:
      return 1
    if cluster.name == "slurm" and "SLURM_STEP_NUM_TASKS" in os.environ:
      # The shell of an allocation is one task, though SLURM_NTASKS has those of the allocation.
      return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return cluster.get_process_count()
  except Exception as error:  # Kubernetes and the metadata server of TPUs answer with errors of many types
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"the cluster does not say how many processes there are ({first}): give --num_processes") from error


def _give_up(hosts: Hosts) -> None:
  if hosts.coordinator_address is None:
    who, where = "the processes of this cluster", ""
  else:
    who = f"process {hosts.process_id} of {hosts.num_processes}"
    where = f" at {hosts.coordinator_address}"
  sys.stderr.write(
    f"error: --initialization_timeout={hosts.initialization_timeout}: {who} waited so many seconds for the"
    f" others{where}: wanted every process started, and process 0 within their reach\n"
  )
  sys.stderr.flush()
  os._exit(UserError.exit_code)


def _broadcast(text: str) -> str:
  """Returns process 0's text."""
  mine = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
  sent = np.zeros(_room(size), np.uint8)
  if is_first():
    sent[:size] = mine
  return multihost_utils.broadcast_one_to_all(sent)[:size].tobytes().decode()


def _room(size: int) -> int:
  return -(-size // 1024) * 1024  # few sizes, few programs to compile


def _wait() -> None:
  multihost_utils.sync_global_devices("moe_lab")
