"""Trains and measures a run of a study: what is finished is taken as it is, what was interrupted goes on."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_lab.config import program
from moe_lab.config.schema import Config
from moe_lab.errors import RunError
from moe_lab.io.run import is_finished
from moe_lab.launch.local import Stop

log = logging.getLogger(__name__)


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


def perform(job: Job, stop: Stop) -> dict:
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
