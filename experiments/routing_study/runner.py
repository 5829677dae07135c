"""Trains the runs of a sweep one after another; what is finished is taken as it is, what was interrupted goes on."""

import logging
from pathlib import Path

from moe_lab.config.schema import Config
from moe_lab.errors import RunError
from moe_lab.io.run import load_run
from moe_lab.train.loop import train

log = logging.getLogger(__name__)


def is_finished(workdir: Path, config: Config) -> bool:
  """Returns whether `workdir` holds this very run, trained and evaluated to the end.

  A run of another configuration is not finished: `train` then says in which field it differs.
  """
  return (workdir / "evaluation.json").is_file() and load_run(workdir)[0] == config


def train_run(workdir: Path, config: Config, cache_dir: Path, argv: list[str]) -> str | None:
  """Trains a run as far as it is not trained yet.

  Returns:
    None, or why the run failed: a study goes on without a run that diverged.

  Raises:
    UserError: the folder holds something else.
    SystemExit: 75 after SIGTERM, with everything saved.
  """
  if is_finished(workdir, config):
    return None
  try:
    train(config, workdir, cache_dir, argv)
  except RunError as error:
    log.warning("%s failed: %s", workdir.name, error)
    return str(error)
  return None
