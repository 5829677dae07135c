"""A trained model from a run's directory."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_lab.config.schema import Config
from moe_lab.data.tokenizer import RUN_FILES, Tokenizer, load_tokenizer
from moe_lab.errors import UserError
from moe_lab.infer.engine import Engine
from moe_lab.io.checkpoint import Checkpointer, in_host_memory
from moe_lab.io.run import load_run
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import RouterState
from moe_lab.train.state import abstract_state


class LoadedModel(NamedTuple):
  """A checkpoint ready for inference.

  Attributes:
    config: of its run.
    model: pure apply.
    params: parameters.
    router_state: with the greedy rule's calibration.
    budget: mean experts to ask for.
    step: of the checkpoint.
    fingerprint: of the tokenizer it was trained with.
  """

  config: Config
  model: Transformer
  params: Any
  router_state: RouterState
  budget: float
  step: int
  fingerprint: str

  def check_fingerprint(self, found: str) -> None:
    """Refuses to read the model's numbers with another tokenizer's ids."""
    if found != self.fingerprint:
      raise UserError(
        f"the tokenizer now is {found[:12]}, but the checkpoint was trained with {self.fingerprint[:12]}: "
        "the data of the run must be the same as when it was trained"
      )


class TextModel(NamedTuple):
  """A checkpoint and the tokenizer it was trained with: text in, text out."""

  loaded: LoadedModel
  tokenizer: Tokenizer

  def tokens(self, text: str) -> list[int]:
    """Returns a text's ids, behind the one that begins a document. Raises UserError if the text is not UTF-8."""
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise UserError(f"prompt: wanted text in UTF-8, but character {error.start + 1} is none") from None
    return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]

  def engine(self, *, slots: int, capacity: int, **arguments) -> Engine:
    """Returns an engine that serves the model at its budget; arguments: of `Engine`.

    Raises:
      UserError: memory has no room for so many sequences; or as `Engine`.
    """
    model = self.loaded
    settings = {"budget": model.budget, "decode": self.tokenizer.decode} | arguments
    try:
      return Engine(model.config, model.params, model.router_state, slots=slots, capacity=capacity, **settings)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise UserError(f"max_tokens: no room for {slots} x {capacity} tokens in memory; wanted fewer") from None


def checked_budget(config: Config, budget: float | None, flag: str = "--budget") -> float:
  """Returns the budget to use; one out of range is the user's mistake, of that flag."""
  routing = config.routing
  if routing.fixed:
    if budget not in (None, routing.k):
      raise UserError(f"{flag}={budget:g}: the run's method is topk, which always takes config.routing.k = {routing.k}")
    return float(routing.k)
  budget = routing.budget if budget is None else budget
  low, high = routing.budgets
  if not low <= budget <= high:
    wanted = f"{low:g}" if low == high else f"a number from {low:g} to {high:g}"
    raise UserError(f"{flag}={budget:g}: wanted {wanted}, what the run was trained for")
  return budget


def load_model(
  workdir: Path, step: int | None = None, budget: float | None = None, in_host: bool = False
) -> LoadedModel:
  """Loads a checkpoint.

  Args:
    workdir: of the run.
    step: which checkpoint; None: the newest.
    budget: mean experts to ask for; None: the trained budget.
    in_host: leave the parameters in host memory, as arrays of numpy, for an engine that puts only some of them onto the
      device (`resident_experts`).

  Raises:
    UserError: no run, no such checkpoint, or a budget out of range.
  """
  config, info = load_run(workdir)
  budget = checked_budget(config, budget)
  abstract = abstract_state(config)
  with Checkpointer(workdir, keep=None) as checkpointer:
    state, _, step = checkpointer.restore(in_host_memory(abstract) if in_host else abstract, step)
  router_state = jax.device_put(state.router_state)  # small, and read at every step
  return LoadedModel(
    config, Transformer(config), state.params, router_state, budget, step, info.get("tokenizer_fingerprint", "")
  )


def load_text_model(
  workdir: Path, step: int | None = None, budget: float | None = None, in_host: bool = False
) -> TextModel:
  """Loads a checkpoint with its tokenizer; arguments and errors as `load_model`'s, and UserError for a run without."""
  loaded = load_model(workdir, step, budget, in_host)
  found = [path for name in RUN_FILES if (path := workdir / name).exists()]
  if not found:
    raise UserError(
      f"{workdir} has no {RUN_FILES[0]}: it was trained on a synthetic task, or imported without a tokenizer, "
      "and has no text to generate"
    )
  tokenizer = load_tokenizer(str(found[0]), loaded.config.data.vocab_size)
  loaded.check_fingerprint(tokenizer.fingerprint)
  return TextModel(loaded, tokenizer)
