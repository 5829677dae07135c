"""Trains and measures the runs of a sweep, one after another or several side by side, each on its share of the cores.

What is finished is taken as it is, what was interrupted goes on. Models of a
study are often too small for the cores of a machine: two such runs on one core
each take little longer than one run on both.
"""

import concurrent.futures
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_lab.config import program
from moe_lab.config.schema import Config
from moe_lab.errors import RunError
from moe_lab.io.run import load_run

log = logging.getLogger(__name__)

PATIENCE = 0.5  # seconds between two looks at whether the study is to stop
_leaving = False  # in a worker: whether it was told to stop, and leaves what else the pool has for it


class Job(NamedTuple):
  """A run to train and to measure.

  Attributes:
    folder: of the run.
    config: of the run.
    notes: of the run in its sweep: what is measured.
    split: to measure on.
    argv: the study's command, for the run's record.
  """

  folder: Path
  config: Config
  notes: Mapping[str, str]
  split: str
  argv: Sequence[str]


def is_finished(workdir: Path, config: Config) -> bool:
  """Returns whether `workdir` holds this very run, trained and evaluated to the end.

  A run of another configuration is not finished: `train` then says in which field it differs.
  """
  return (workdir / "evaluation.json").is_file() and load_run(workdir)[0] == config


def perform(job: Job, stop: Callable[[], None]) -> dict:
  """Trains a run as far as it is not trained yet, and measures what was not measured yet.

  Returns:
    "failed": None, or why the run failed: a study goes on without a run that diverged. Beside it what `measure` gives.

  Raises:
    UserError: the folder holds something else.
    SystemExit: 75 after SIGTERM, with everything saved.
  """
  from experiments.routing_study.measure import measure
  from moe_lab.train.loop import train

  if not is_finished(job.folder, job.config):
    try:
      train(job.config, job.folder, program.cache_dir(), list(job.argv))
    except RunError as error:
      log.warning("%s failed: %s", job.folder.name, error)
      return {"failed": str(error)}
  return {"failed": None} | measure(job.folder, job.split, job.notes, program.cache_dir(), stop)


def performed(jobs: Sequence[Job], workers: int, stop: Callable[[], None]) -> Iterator[dict]:
  """Yields the jobs' results in their order.

  Args:
    jobs: what to do.
    workers: processes that work side by side; with one, this process does it all. Each gets an equal share of the
      cores, and writes what it has to say to `FOLDER.log` beside the run's folder.
    stop: called between steps; raises to leave.
  """
  if workers == 1:
    for job in jobs:
      stop()
      yield perform(job, stop)
    return
  # Spawned: a fork would take over jax's threads half-way. A process of the pool serves one job after another.
  context = multiprocessing.get_context("spawn")
  places = context.Queue()
  for place in range(workers):
    places.put(place)
  with concurrent.futures.ProcessPoolExecutor(workers, context, _settle, (places, workers)) as pool:
    futures = [pool.submit(_perform_apart, job) for job in jobs]
    try:
      for future in futures:
        while not future.done():
          stop()
          concurrent.futures.wait([future], timeout=PATIENCE)
        yield future.result()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      for process in multiprocessing.active_children():
        process.terminate()  # SIGTERM: what is running saves itself
      raise


def _settle(places: multiprocessing.Queue, workers: int) -> None:
  """Gives a new worker its cores, before jax counts them."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if mine := cores[places.get() :: workers]:
    os.sched_setaffinity(0, mine)
  program.prepare()


def _perform_apart(job: Job) -> dict:
  global _leaving
  from moe_lab.train.loop import PREEMPTED
  from moe_lab.train.signals import Preemption

  job.folder.parent.mkdir(parents=True, exist_ok=True)
  with job.folder.with_name(job.folder.name + ".log").open("a") as file:
    os.dup2(file.fileno(), sys.stderr.fileno())
  with Preemption() as preemption:

    def stop() -> None:
      if preemption.requested:
        raise SystemExit(PREEMPTED)

    try:
      if _leaving:  # the pool hands out some jobs ahead
        raise SystemExit(PREEMPTED)
      stop()
      return perform(job, stop)
    except SystemExit:
      _leaving = True
      raise
