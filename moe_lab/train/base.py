"""A trained run as the beginning of another: its whole state, and new runs that are made of it without training."""

import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_lab.adapt.learning import join, split
from moe_lab.adapt.lora import adapter_coverage, adapters
from moe_lab.adapt.quantise import calibrated
from moe_lab.config.schema import Config
from moe_lab.data.tokenizer import RUN_FILES
from moe_lab.errors import ConfigError, UserError
from moe_lab.io.checkpoint import Checkpointer, in_host_memory
from moe_lab.io.files import dump_json, write_text
from moe_lab.io.run import CARRIED, load_run, open_run
from moe_lab.train.loop import Start
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import TrainState, abstract_plain_params, abstract_state, adapter_key, initial_state
from moe_lab.types import Batch


class Base(NamedTuple):
  """A checkpoint of a run; arrays are numpy's, so that they may go to any devices.

  Attributes:
    workdir: of the run.
    config: of the run.
    state: whole.
    meta: what was saved beside it.
    step: of the checkpoint.
    fingerprint: of the run's tokenizer.
    manifest: of the run's data.
    imported: what run.json says of the checkpoint that it was imported from; {}: it was not.
  """

  workdir: Path
  config: Config
  state: TrainState
  meta: dict
  step: int
  fingerprint: str
  manifest: list[dict]
  imported: dict

  def stays_in_family(self, config: Config) -> bool:
    """Returns whether a run of this configuration, made of this imported one, can go out as it came in."""
    return bool(self.imported) and (config.model.num_experts, config.routing.method, config.routing.k) == (
      self.config.model.num_experts, self.config.routing.method, self.config.routing.k
    )  # fmt: skip

  def notes(self, config: Config) -> dict:
    """Returns what the run.json of a run that is made of this one says of it."""
    came = {"imported": self.imported} if self.stays_in_family(config) else {}
    return {"base": {"workdir": str(self.workdir), "step": self.step}} | came


def load_base(workdir: Path, step: int | None = None) -> Base:
  """Loads a run's checkpoint, the newest if `step` is None; raises UserError as `load_model` does."""
  config, info = load_run(workdir)
  with Checkpointer(workdir, keep=None) as checkpointer:
    state, meta, step = checkpointer.restore(in_host_memory(abstract_state(config)), step)
  fingerprint, manifest = info["tokenizer_fingerprint"], info["data"]
  return Base(workdir, config, state, meta, step, fingerprint, manifest, info.get("imported", {}))


def check_new(workdir: Path) -> None:
  """Raises UserError if there is anything in `workdir`: what is made without training is made once."""
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise UserError(f"--workdir={workdir} is there already: wanted a new folder")


def with_params(state: TrainState, params: Any, config: Config) -> TrainState:
  """Returns a state with other parameters, which the optimizer has not seen yet."""
  opt_state = make_optimizer(config.train).init(split(params, config.adapt)[0])
  return state._replace(params=params, opt_state=opt_state)


def write_run(
  workdir: Path, config: Config, base: Base, state: TrainState, manifest: list[dict], argv: list[str], report: dict
) -> None:
  """Writes a run that is made of another, as training would have left it.

  Args:
    workdir: new.
    config: of the new run; its `adapt` says what form the parameters have.
    base: that they were made of.
    state: of the new run.
    manifest: of the data.
    argv: the command.
    report: for adaptation.json.
  """
  with open_run(workdir, config, fingerprint=base.fingerprint, manifest=manifest, argv=argv) as run:
    run.note(**base.notes(config))
    with Checkpointer(workdir, keep=1) as checkpointer:
      checkpointer.save(base.step, state, base.meta)
      checkpointer.wait()
    keep_files(base, config, workdir)
    write_text(workdir / "adaptation.json", dump_json(report, indent=2) + "\n")


def keep_files(base: Base, config: Config, workdir: Path) -> None:
  """Copies the base's tokenizer and, for an export that can be as it came, what came with an imported checkpoint."""
  for name in RUN_FILES:
    if (base.workdir / name).is_file():
      shutil.copyfile(base.workdir / name, workdir / name)
  if base.stays_in_family(config) and (base.workdir / CARRIED).is_dir():
    shutil.copytree(base.workdir / CARRIED, workdir / CARRIED, dirs_exist_ok=True)


def check_readable(base: Base) -> None:
  """Raises UserError if no text can be read for the base."""
  if not base.fingerprint:
    raise UserError(f"--base={base.workdir} has no tokenizer, since none came with its checkpoint: wanted one that has")


def check_tokens(base: Base, config: Config, fingerprint: str) -> None:
  """Raises UserError if data is read with another tokenizer than the base's."""
  if fingerprint != base.fingerprint:
    wanted = f"the base's own ({base.workdir}/tokenizer.*), or its data"
    raise ConfigError("data.tokenizer", config.data.tokenizer, wanted)


def start_from(base: Base, config: Config, fingerprint: str, calibration: Iterable[Batch]) -> Start:
  """Returns what training an adapted model begins from: the base's weights in the form that `config.adapt` says.

  Args:
    base: plain, or in the 4 bits that `config` asks for too; where the trunk is frozen, of fixed counts.
    config: of the new run.
    fingerprint: of the tokenizer that the new run reads with.
    calibration: batches for what is put into 4 bits.
  """
  check_tokens(base, config, fingerprint)
  reference = split(base.state.params, config.adapt)[0] if config.adapt.router == "held" else None
  state = functools.partial(_state_from, base, config, calibration)
  return Start(state, reference, base.fingerprint, base.notes(config))


def _state_from(base: Base, config: Config, calibration: Iterable[Batch]) -> TrainState:
  """Returns the state before the first step."""
  state, params = base.state, base.state.params
  if config.adapt.trunk == "frozen":
    new = jax.jit(lambda: initial_state(config, make_optimizer(config.train)))()
    params = join(params, new.params)  # what the base has, and heads
    routed = new.router_state._replace(bias_E=state.router_state.bias_E, load_E=state.router_state.load_E)
    state = new._replace(router_state=routed)
  if config.adapt.weights != base.config.adapt.weights:
    params, _ = calibrated(base.config, params, base.state.router_state, calibration, config.adapt.weights)
  if config.adapt.lora_rank:
    plain = abstract_plain_params(config)
    added = adapters(plain, config, adapter_key(config))
    adapter_coverage(plain, added, config)
    params = join(added, params)
  zero = np.zeros((), np.int32)
  state = with_params(state._replace(step=zero, skipped_in_a_row=zero), params, config)
  return jax.tree.map(np.asarray, state)
