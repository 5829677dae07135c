"""What the cost benchmark serves: a model trained for it or a run's, and prompts that are easy or hard for it."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.case import PROMPT, Case
from moe_lab.config import program
from moe_lab.config.schema import Config
from moe_lab.data.loader import Data, open_data
from moe_lab.errors import UserError
from moe_lab.evaluate.perplexity import make_eval_step
from moe_lab.infer.placement import served
from moe_lab.infer.request import Request
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import RouterState
from moe_lab.routing.registry import make_router
from moe_lab.train.load import load_model
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

STEPS, WARMUP_STEPS = 150, 40  # of training: a minute on two cores; then counts follow the text, and losses are poor
SEQ_LEN = 256  # that a model is trained on, so that steps are short
CANDIDATES = 256  # stretches of held-out text that prompts are chosen from ...
KEPT = 32  # ... of which so many of least and so many of most loss stay

log = logging.getLogger("experiments.benchmark")


class Served(NamedTuple):
  """A model to be measured.

  Attributes:
    config: its own.
    params: as an engine takes them, so that all engines share them.
    router_state: with the greedy rule's calibration.
    data: that it was trained on.
    words: what it is, for the reader.
  """

  config: Config
  params: Any
  router_state: RouterState
  data: Data
  words: str


def made(case: Case, budgets: tuple[float, ...]) -> Served:
  """Trains a small model with these shapes for any budget from 1 to the highest of `budgets`, on the standard library.

  It takes a minute or two, and learns little: enough for counts that differ from token to token.
  """
  config = made_config(case, budgets)
  data = open_data(config.data, program.cache_dir())
  optimizer = make_optimizer(config.train)
  state = jax.jit(lambda: initial_state(config, optimizer))()
  step, loader, losses = make_train_step(config, Transformer(config), optimizer), data.train_loader(case.batch_size), []
  for number in range(STEPS):
    state, metrics = step(state, next(loader))
    losses.append(metrics.loss_sum / metrics.loss_weight)
    if number % 25 == 24:
      log.info("trained %d of %d steps, loss %.2f", number + 1, STEPS, float(np.mean(losses[-25:])))
  words = f"a model trained for {STEPS} steps in this run, to a loss of {float(np.mean(losses[-25:])):.2f} nats"
  return Served(config, served(state.params, config.model), state.router_state, data, words)


def made_config(case: Case, budgets: tuple[float, ...]) -> Config:
  """Returns the configuration of `made`; the first budget is the one it is trained for first of all."""
  config = dataclasses.replace(case, method="dynamic", k=budgets[0], seq_len=min(case.seq_len, SEQ_LEN)).config()
  routing = dataclasses.replace(
    config.routing, learner="curvature", warmup_steps=WARMUP_STEPS, budget_range=(1.0, max(2.0, *budgets))
  )
  train = dataclasses.replace(config.train, steps=STEPS)
  return dataclasses.replace(config, routing=routing, train=train)


def loaded(workdir: Path) -> Served:
  """Returns a run's newest checkpoint. Raises UserError if it can't be served, or its data is not here."""
  model = load_model(workdir)
  if not make_router(model.config.routing).causal:
    raise UserError(f"--workdir={workdir}: wanted a causal method, not {model.config.routing.method}")
  data = open_data(model.config.data, program.cache_dir())
  model.check_fingerprint(data.fingerprint)
  words = f"the model of {workdir.name}, step {model.step}"
  return Served(model.config, served(model.params, model.config.model), model.router_state, data, words)


def with_fixed_count(config: Config, k: int) -> Config:
  """Returns the configuration that gives every token k experts of the same weights.

  A router has whatever fixed top-k wants; the rest of its parameters are then not read.
  """
  routing = config.routing
  fixed = dataclasses.replace(
    routing, method="topk", k=k, budget_range=(), gate=routing.slot_gate, standardise=routing.standardised
  )
  return dataclasses.replace(config, routing=fixed)


class Prompts(NamedTuple):
  """Prompts of one length, in pairs of an easy and a hard one.

  Attributes:
    tokens: int32 [n, tokens].
    kinds: easy | hard, of each.
    losses: mean loss of each kind, in nats per token.
    experts: mean experts of their tokens at each budget.
  """

  tokens: np.ndarray
  kinds: list[str]
  losses: dict[str, float]
  experts: dict[float, float]

  def requests(self, first: int, **settings) -> Iterator[tuple[str, Request]]:
    """Yields kinds and requests without end, from prompt `first` on; each draws by a seed of its own."""
    for index in itertools.count(first):
      place = index % len(self.tokens)
      yield self.kinds[place], Request(self.tokens[place], seed=index, **settings)


def prompts(model: Served, budgets: tuple[float, ...], candidates: int = CANDIDATES, kept: int = KEPT) -> Prompts:
  """Chooses prompts from held-out data: those whose tokens the model finds easiest to predict, and hardest."""
  length = min(PROMPT, model.config.data.seq_len)
  rows = np.concatenate([
    batch.tokens[(batch.segments[:, : length + 1] == 1).all(1), : length + 1]
    for batch in model.data.eval_batches("validation", kept, max_batches=candidates // kept)
  ])  # fmt: skip
  eval_step = make_eval_step(model.config, Transformer(model.config, unrolled=True))

  def results(rows: np.ndarray, budget: float):
    """Yields losses [n, length] and counts [Z, n, length], `kept` rows at a time, so that one program serves all."""
    for start in range(0, len(rows), kept):
      part = rows[start : start + kept]
      filled = np.concatenate([part, np.zeros((kept - len(part), length + 1), np.int32)])
      result = eval_step(model.params, model.router_state, Batch(filled, np.ones_like(filled), filled * 0), budget)
      yield np.asarray(result.nll_BL)[: len(part)], np.asarray(result.count_ZBL)[:, : len(part)]

  loss = np.concatenate([nll_BL.mean(1) for nll_BL, _ in results(rows, budgets[0])])
  order, pairs = np.argsort(loss), min(kept, len(rows) // 2)
  if not pairs:
    raise UserError(f"the validation split has no two stretches of {length} tokens to take prompts from")
  chosen = np.stack([order[:pairs], order[::-1][:pairs]], axis=1).ravel()  # easy, hard, easy, ...
  losses = {"easy": float(loss[order[:pairs]].mean()), "hard": float(loss[order[::-1][:pairs]].mean())}
  experts = {b: float(np.mean([count_ZBL.mean() for _, count_ZBL in results(rows[chosen], b)])) for b in budgets}
  return Prompts(rows[chosen, :length], ["easy", "hard"] * pairs, losses, experts)
