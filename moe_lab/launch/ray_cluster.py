"""Runs on a Ray cluster that is there already: each is a task, wherever there is place for it.

The nodes share a file system, on which the folders of the runs and this code have the same paths; a run is one node's.
A run whose node or process dies begins again elsewhere, from its checkpoint. Needs the extra `ray` of this package.
"""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from moe_lab.config import program
from moe_lab.errors import UserError, require
from moe_lab.io import lock
from moe_lab.launch import local

log = logging.getLogger(__name__)

_ANSWER = 20.0  # seconds that the cluster has to answer; ray.init by itself waits for more than a minute, then exits
_SAVING = 120.0  # seconds that runs have to save themselves when all is to stop


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where to run.

  Attributes:
    address: HOST:PORT of the head node, or "auto": what $RAY_ADDRESS or a Ray on this machine says.
    cpus, gpus: that a run reserves on its node.
    retries: how often a run may begin again after its node or process died.
  """

  address: str
  cpus: int
  gpus: int
  retries: int


class Preempted(Exception):
  """A task was told to leave, and has saved; Ray starts it again, unless it was the sweep that told it."""


def performed(
  jobs: Sequence[local.Job], perform: Callable[[local.Job, local.Stop], dict], cluster: Cluster, stop: local.Stop
) -> Iterator[dict]:
  """Yields the jobs' results in their order: what `perform` returns, or {"failed": why} where Ray gave a job up.

  Args:
    jobs: what to do. What they have to say is in `FOLDER.log` beside the folder of each.
    perform: does one; a function of a module, since other processes import it.
    cluster: where.
    stop: called between two looks; when it raises, running jobs are asked to save themselves, and waited for.

  Raises:
    UserError: Ray is not installed, or the cluster does not answer.
  """
  _connect(cluster.address)
  import ray

  try:
    _warn_of_too_much(cluster, ray.nodes())
    task = ray.remote(
      num_cpus=cluster.cpus,
      num_gpus=cluster.gpus,
      max_retries=cluster.retries,
      retry_exceptions=[Preempted],
      max_calls=1,  # a process a run: jax gives memory and devices back when its process ends
    )(_perform)
    # The same name whenever this sweep is started, which one process at a time may do (its own lock): what bears it
    # is an earlier attempt.
    waiting = [task.remote(perform, job, f"ray {job.folder.absolute()}") for job in jobs]
    try:
      while waiting:
        while not ray.wait(waiting[:1], timeout=local.PATIENCE)[0]:
          stop()
        yield _result(waiting.pop(0), cluster)
    except BaseException:
      for reference in waiting:
        ray.cancel(reference)
      ray.wait(waiting, num_returns=len(waiting), timeout=_SAVING)
      raise
  finally:
    ray.shutdown()


def _perform(perform: Callable[[local.Job, local.Stop], dict], job: local.Job, name: str) -> dict:
  """Does a job on its node."""
  os.environ[lock.JOB] = name
  program.prepare()
  # ray.cancel interrupts; the loop knows SIGTERM, which lets it save.
  signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
  try:
    return local.perform_apart(perform, job)
  except SystemExit:
    raise Preempted from None


def _result(reference, cluster: Cluster) -> dict:
  import ray

  try:
    return ray.get(reference)
  except ray.exceptions.RayError as error:
    if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, Preempted):
      raise  # a mistake in this code
    why = str(error).strip().splitlines()[0]
    return {"failed": f"given up after {cluster.retries} retries: {type(error).__name__}: {why}"}


def _connect(address: str) -> None:
  require("ray", "--launcher=ray", "ray")
  _check_answer(address)
  import ray

  heard = signal.getsignal(signal.SIGTERM)
  try:
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
  except (ConnectionError, RuntimeError, ValueError) as error:  # other versions of Ray or Python, say
    raise UserError(f"--ray_address={address}: {' '.join(str(error).split())}") from None
  finally:
    signal.signal(signal.SIGTERM, heard)  # Ray's own ends the process at once, and with it every run that is not saved


def _check_answer(address: str) -> None:
  """Raises UserError where no cluster answers; asked from a process that can be given up."""
  # The client of a cluster's head node. What Ray's command `health-check` asks of it, without the check of versions.
  ask = (
    "import sys; from ray._private import services; from ray._raylet import GcsClient; "
    "GcsClient(address=services.canonicalize_bootstrap_address_or_die(sys.argv[1]))"
  )
  try:
    command = [sys.executable, "-c", ask, address]
    answers = subprocess.run(command, capture_output=True, timeout=_ANSWER).returncode == 0
  except subprocess.TimeoutExpired:
    answers = False
  if not answers:
    wanted = "the HOST:PORT at which `ray start --head` said that its cluster is to be reached"
    raise UserError(f"--ray_address={address}: no Ray cluster answers there: wanted {wanted}")


def _warn_of_too_much(cluster: Cluster, nodes: Sequence[dict]) -> None:
  # A warning only: an autoscaler may bring larger nodes.
  alive = [node["Resources"] for node in nodes if node["Alive"]]
  if not any(node.get("CPU", 0) >= cluster.cpus and node.get("GPU", 0) >= cluster.gpus for node in alive):
    log.warning("no node has %d CPUs and %d GPUs for a run: waiting for one", cluster.cpus, cluster.gpus)
