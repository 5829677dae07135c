"""Runs side by side on this machine, each on its share of the cores.

Models of a study are often too small for the cores of a machine: two such runs on one core each take little longer
than one run on both.
"""

import concurrent.futures
import concurrent.futures.process
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from moe_lab.config import program
from moe_lab.errors import PREEMPTED, RunError

# What imports jax is imported where it is used: a worker gets its cores before jax counts them.

PATIENCE = 0.5  # seconds between two looks at whether all is to stop
_leaving = False  # in a worker: whether it was told to stop, and leaves what else the pool has for it

Stop = Callable[[], None]  # called between steps; raises SystemExit(75) to leave


class Job(Protocol):
  """What is to be done in a folder of its own; it travels to another process, so it can be pickled."""

  folder: Path


def stop_of(preemption) -> Stop:
  """Returns what raises SystemExit(75) once SIGTERM has come: `preemption` is a `train.signals.Preemption`."""

  def stop() -> None:
    if preemption.requested:
      raise SystemExit(PREEMPTED)

  return stop


def performed(jobs: Sequence[Job], perform: Callable[[Job, Stop], dict], workers: int, stop: Stop) -> Iterator[dict]:
  """Yields the jobs' results in their order.

  Args:
    jobs: what to do.
    perform: does one; a function of a module, since other processes import it.
    workers: processes that work side by side; with one, this process does it all. Each gets an equal share of the
      cores, and writes what it has to say to `FOLDER.log` beside the job's folder.
    stop: called between two looks.

  Raises:
    RunError: a worker was killed from outside, which leaves the others' pool unusable.
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
  apart = functools.partial(perform_apart, perform)
  with concurrent.futures.ProcessPoolExecutor(workers, context, _settle, (places, workers)) as pool:
    futures = [pool.submit(apart, job) for job in jobs]
    try:
      for future in futures:
        while not future.done():
          stop()
          concurrent.futures.wait([future], timeout=PATIENCE)
        yield future.result()
    except concurrent.futures.process.BrokenProcessPool:
      raise RunError(
        "a worker process was killed, out of memory perhaps; the logs beside the folders show how far each run came, "
        "and the same command goes on from there"
      ) from None
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


def perform_apart(perform: Callable[[Job, Stop], dict], job: Job) -> dict:
  """Does a job in a process that does nothing else: its logs go to `FOLDER.log`, SIGTERM asks it to save and to leave.

  Raises:
    SystemExit: 75 after SIGTERM.
  """
  global _leaving
  from moe_lab.train.signals import Preemption

  job.folder.parent.mkdir(parents=True, exist_ok=True)
  with job.folder.with_name(job.folder.name + ".log").open("a") as file:
    os.dup2(file.fileno(), sys.stderr.fileno())
  with Preemption() as preemption:
    stop = stop_of(preemption)
    try:
      if _leaving:  # the pool hands out some jobs ahead
        raise SystemExit(PREEMPTED)
      stop()
      return perform(job, stop)
    except SystemExit:
      _leaving = True
      raise
