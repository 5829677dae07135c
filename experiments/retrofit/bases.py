"""Models of fixed k to teach policies on: trained as such, or made of dense ones, whose copies are trained apart."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from moe_lab.config import modes, program
from moe_lab.config.load import load
from moe_lab.config.resolve import resolve
from moe_lab.config.schema import Config

CONFIG = Path(__file__).parents[2] / "configs/retrofit.py"
PIECES = 4  # that a dense MLP is cut into, each an expert
SAME = 1e-5  # nats per token by which upcycling may move the loss


def fixed(folder: Path, size: str, seed: int) -> Path:
  """Trains a model of fixed k, or goes on; returns its folder."""
  return _trained(_config(size, seed), folder)


def upcycled(workdir: Path, size: str, seed: int) -> Path:
  """Trains a dense model, makes experts of it and trains those on, or goes on; returns the folder of the last.

  The experts are `configs/retrofit.py`'s. Each training has two thirds of its steps, at its rate.
  """
  from moe_lab.train.adapted import train_adapted, upcycle
  from moe_lab.train.base import load_base

  config = _config(size, seed)
  model = dataclasses.replace(
    config.model, num_dense_layers=config.model.num_layers, dense_dim=PIECES * config.model.expert_dim
  )
  steps = 2 * config.train.steps // 3
  dense = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, steps=steps))
  folders = _folders(workdir, seed)
  _trained(dense, folders["dense"])
  if not folders["upcycled"].is_dir():  # which appears when all of it is there
    base = load_base(folders["dense"])
    begun = modes.begun("upcycle", base.config, folders["dense"])
    begun.model.num_experts, begun.model.expert_dim = config.model.num_experts, config.model.expert_dim
    begun.routing.k = config.routing.k
    part = workdir / f"{folders['upcycled'].name}.part"
    shutil.rmtree(part, ignore_errors=True)
    asked = modes.adapted("upcycle", base.config, resolve(begun), folders["dense"])
    upcycle(base, asked, part, program.cache_dir(), sys.argv)
    part.rename(folders["upcycled"])
  if not (folders["tuned"] / "adaptation.json").is_file():  # which is written last
    base = load_base(folders["upcycled"])
    asked = resolve(modes.begun("finetune", base.config, base.workdir))
    asked = modes.adapted("finetune", base.config, asked, base.workdir)
    train_adapted(base, asked, folders["tuned"], program.cache_dir(), sys.argv)
  return folders["tuned"]


def upcycling(workdir: Path, seed: int, split: str) -> dict:
  """Returns what became of the loss in `upcycled`.

  Args:
    workdir: of the study.
    seed: of the models.
    split: of the losses before and after training.

  Returns:
    dense and tuned (losses, nats per token); moved, by how much upcycling changed the loss, and same, whether that is
    next to nothing, as it must be.
  """
  folders, loss = _folders(workdir, seed), {"validation": "val_loss", "test": "test_loss"}[split]
  made = json.loads((folders["upcycled"] / "adaptation.json").read_text())
  moved = abs(made["loss_after"] - made["loss_before"])
  return {
    "dense": json.loads((folders["dense"] / "evaluation.json").read_text())[loss],
    "moved": moved,
    "same": moved <= SAME,
    "tuned": json.loads((folders["tuned"] / "adaptation.json").read_text())[loss],
  }


def _folders(workdir: Path, seed: int) -> dict[str, Path]:
  """Returns the stages' folders."""
  return {stage: workdir / f"{stage}-{seed}" for stage in ("dense", "upcycled", "tuned")}


def _config(size: str, seed: int) -> Config:
  return resolve(load(f"{CONFIG}:{size}")).with_seed(seed)


def _trained(config: Config, folder: Path) -> Path:
  """Trains a run, or goes on; returns its folder."""
  from moe_lab.io.run import is_finished
  from moe_lab.train.loop import train

  if not is_finished(folder, config):
    train(config, folder, program.cache_dir(), sys.argv)
  return folder
