"""What a launcher does with one run of a sweep: trains it as far as it is not trained yet, and writes its page."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_lab.config import program
from moe_lab.config.schema import Config
from moe_lab.errors import UserError

log = logging.getLogger(__name__)


class Job(NamedTuple):
  """A run to train.

  Attributes:
    folder: of the run.
    config: of the run.
    argv: the sweep's command, for the run's record.
  """

  folder: Path
  config: Config
  argv: Sequence[str]


def perform(job: Job, stop) -> dict:
  """Trains a run, unless it is finished.

  Args:
    job: the run.
    stop: not asked: `train` hears SIGTERM itself.

  Returns:
    "failed": None, or why the run failed: the others go on.

  Raises:
    SystemExit: 75 after SIGTERM, with everything saved.
  """
  from moe_lab.io.run import is_finished
  from moe_lab.report.run_page import write_report
  from moe_lab.train.loop import train

  try:
    if not is_finished(job.folder, job.config):
      train(job.config, job.folder, program.cache_dir(), list(job.argv))
      write_report(job.folder)
  except UserError as error:
    log.warning("%s failed: %s", job.folder.name, error)
    return {"failed": str(error)}
  except Exception as error:  # out of memory, say; whatever it is, it is this run's
    log.exception("%s failed", job.folder.name)
    return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
  return {"failed": None}
