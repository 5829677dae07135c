"""Making and training an adapted model, and what its routing has become beside the base's."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_lab.adapt.lora import adapter_coverage
from moe_lab.adapt.upcycle import upcycled
from moe_lab.config.schema import Config
from moe_lab.data.loader import Data, open_data
from moe_lab.errors import UserError
from moe_lab.evaluate.drift import Routed, routing_drift
from moe_lab.evaluate.fewer import fewer_experts, loss_of
from moe_lab.io.files import dump_json, write_text
from moe_lab.routing.base import RouterState
from moe_lab.train.adapter import write_adapter
from moe_lab.train.base import Base, check_new, check_readable, keep_files, load_base, start_from, write_run
from moe_lab.train.loop import train
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import TrainState, abstract_plain_params, state_of
from moe_lab.types import Batch

CALIBRATION_BATCHES = 8
BUDGETS = 5  # that a policy of any budget is asked for

log = logging.getLogger(__name__)


def calibration_batches(data: Data, config: Config) -> Iterator[Batch]:
  """Returns the first batches of training."""
  return itertools.islice(data.train_loader(config.train.batch_size), CALIBRATION_BATCHES)


def routed(state: TrainState) -> Routed:
  """Returns what of a state a comparison needs."""
  return Routed(state.params, state.router_state)


def drift(base: Base, config: Config, params: Any, router_state: RouterState, data: Data) -> dict:
  """Returns `routing_drift` from the base on the validation documents of some data."""
  return routing_drift(
    config, routed(base.state), Routed(params, router_state), data.eval_batches("validation", config.train.batch_size)
  )


def losses(base: Base, config: Config, state: TrainState, data: Data) -> dict:
  """Returns loss_before and loss_after, of the base and of what was made of it, on a sample of the validation rows."""
  batches = list(data.eval_batches("validation", config.train.batch_size, CALIBRATION_BATCHES))
  return {
    "loss_before": loss_of(base.config, routed(base.state), batches, data.class_names),
    "loss_after": loss_of(config, routed(state), batches, data.class_names),
  }


def saved(base: Base, config: Config, state: TrainState, data: Data, split: str = "validation") -> dict:
  """Returns `fewer_experts` of a policy on the base's frozen model, at the trained budget and others that it takes."""
  budgets = sorted({config.routing.budget, *np.linspace(*config.routing.budgets, BUDGETS).tolist()})
  models = (base.config, routed(base.state)), (config, routed(state))
  return fewer_experts(*models, lambda: data.eval_batches(split, config.train.batch_size), data.class_names, budgets)


def upcycle(base: Base, config: Config, workdir: Path, cache_dir: Path, argv: list[str]) -> dict:
  """Writes a run whose experts are copies of a dense model's MLPs.

  Args:
    base: the trained run.
    config: of the new run (`config/modes.py`).
    workdir: of the new run.
    cache_dir: for tokenizers.
    argv: the command, for the record.

  Returns:
    What adaptation.json holds: the report of `upcycled`, and `losses` of a base that has a tokenizer.

  Raises:
    UserError: there is something in `workdir`; or as `upcycled`.
  """
  check_new(workdir)
  params, report = upcycled(base.state.params, config, jax.random.key(config.train.seed))
  state = state_of(config, params, make_optimizer(config.train))._replace(step=base.state.step)
  if base.fingerprint:
    report |= losses(base, config, state, open_data(config.data, cache_dir))
  write_run(workdir, config, base, state, base.manifest, argv, report)
  return report


def train_adapted(base: Base, config: Config, workdir: Path, cache_dir: Path, argv: list[str]) -> dict:
  """Trains adapters, or all weights, from a base on, or continues that run; compares its routing with the base's.

  Args:
    base: the trained run.
    config: of the new run (`config/modes.py`).
    workdir: of the new run.
    cache_dir: for tokenizers.
    argv: the command, for the record.

  Returns:
    What adaptation.json holds: with adapters their `adapter_coverage` and file; drift_target, on the new run's text,
    and drift_source, on the base's where that is other text and is still there; of a policy on a frozen model instead
    fewer_experts (`saved`); and of training steps, val_loss, test_loss, eval_mean_experts.

  Raises:
    UserError, RunError, SystemExit: as `loop.train`.
  """
  check_readable(base)
  target, source = open_data(config.data, cache_dir), None
  alike = config.adapt.trunk == "frozen"  # the choice of experts is the base's
  if not alike and base.config.data.sources != config.data.sources:
    try:
      source = open_data(base.config.data, cache_dir)
    except UserError as error:
      log.warning("the drift on the base's own text is left out: %s", error)
  start = start_from(base, config, target.fingerprint, calibration_batches(target, config))
  result = train(config, workdir, cache_dir, argv, start=start)
  keep_files(base, config, workdir)
  state, report = load_base(workdir).state, {}
  if config.adapt.lora_rank:
    report |= adapter_coverage(abstract_plain_params(config), state.params, config)
    report["adapter"] = write_adapter(workdir / "adapter.npz", state.params, config)
  if alike:
    report["fewer_experts"] = saved(base, config, state, target)
  else:
    report["drift_target"] = drift(base, config, state.params, state.router_state, target)
    if source is not None:
      report["drift_source"] = drift(base, config, state.params, state.router_state, source)
  report |= {key: result[key] for key in ("steps", "val_loss", "test_loss", "eval_mean_experts")}
  write_text(workdir / "adaptation.json", dump_json(report, indent=2) + "\n")
  return report
