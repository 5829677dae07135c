"""Runs as jobs of a Slurm cluster, through submitit: an array with one job a run.

Login and compute nodes share a file system, on which the folders of the runs and this code have the same paths. A job
that comes to its time limit or is preempted saves itself, is queued again and goes on. Needs the extra `slurm` of this
package.
"""

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_lab.config import program
from moe_lab.errors import UserError, require
from moe_lab.io import lock
from moe_lab.launch import local


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where to run, and with what.

  Attributes:
    name: "slurm", or "local": submitit's stand-in, processes of this machine.
    partition: of Slurm; "": its default.
    minutes: that a job may take, until it is queued again.
    cpus, gpus: of a run.
    retries: how often a job may come to its time limit and be queued again; preemptions do not count.
    at_once: jobs that may run at the same time.
  """

  name: str
  partition: str
  minutes: int
  cpus: int
  gpus: int
  retries: int
  at_once: int


def performed(
  jobs: Sequence[local.Job],
  perform: Callable[[local.Job, local.Stop], dict],
  cluster: Cluster,
  folder: Path,
  stop: local.Stop,
) -> Iterator[dict]:
  """Yields the jobs' results in their order: what `perform` returns, or {"failed": why} where a job was given up.

  Args:
    jobs: what to do. What they have to say is in `FOLDER.log` beside the folder of each.
    perform: does one; a function of a module, since other processes import it.
    cluster: where.
    folder: for submitit's own files.
    stop: called between two looks; when it raises, jobs that wait or run are cancelled, which lets them save.

  Raises:
    UserError: submitit is not installed, or this is no machine from which Slurm is reached.
  """
  require("submitit", "--launcher=slurm", "slurm")
  if cluster.name == "slurm" and shutil.which("srun") is None:
    raise UserError("--launcher=slurm: there is no srun here: wanted a login node of a Slurm cluster")
  import submitit

  limits = {"slurm_max_num_timeout": cluster.retries} if cluster.name == "slurm" else {}
  executor = submitit.AutoExecutor(folder, cluster.name, **limits)
  executor.update_parameters(
    name="moe_lab",
    timeout_min=cluster.minutes,
    cpus_per_task=cluster.cpus,
    gpus_per_node=cluster.gpus,
    slurm_array_parallelism=cluster.at_once,
    **({"slurm_partition": cluster.partition} if cluster.partition else {}),
  )
  waiting = executor.map_array(Task(perform), jobs)
  try:
    while waiting:
      while not waiting[0].done():
        stop()
        time.sleep(local.PATIENCE)
      yield _result(waiting.pop(0))
  except BaseException:
    for job in waiting:
      job.cancel(check=False)
    raise


class Task:
  """Does a job on its node. What submitit queues again is this object."""

  def __init__(self, perform: Callable[[local.Job, local.Stop], dict]):
    self._perform = perform

  def __call__(self, job: local.Job) -> dict:
    import submitit

    # The same whenever the job is queued again.
    os.environ[lock.JOB] = f"slurm {submitit.JobEnvironment().job_id}"
    program.prepare()
    warned = []
    queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's; it leaves at once, and the loop has to save before

    def save(number: int, _) -> None:
      if number == signal.SIGUSR2:  # the time limit is near, or there is a job that goes first
        warned.append(number)
      signal.raise_signal(signal.SIGTERM)  # which the loop knows

    signal.signal(signal.SIGUSR2, save)
    signal.signal(signal.SIGINT, save)
    try:
      return local.perform_apart(self._perform, job)
    except SystemExit:
      if warned:
        queue_again(signal.SIGUSR2, None)
      raise

  def checkpoint(self, job: local.Job):
    """Returns what is to be done when the job is queued again: the same, since the run's folder knows how far it is."""
    import submitit

    return submitit.helpers.DelayedSubmission(self, job)


def _result(job) -> dict:
  from submitit.core.utils import UncompletedJobError

  try:
    return job.result()
  except UncompletedJobError as error:
    return {"failed": f"job {job.job_id}: {str(error).strip().splitlines()[0]}"}
