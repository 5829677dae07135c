"""What is asked of the engine, and whether that makes sense."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.infer.sampling import TOP

_MOST = 2**31 - 1  # of an integer on the device


@dataclasses.dataclass(frozen=True)
class Request:
  """What to write on from, and how.

  Attributes:
    prompt: token ids, at least one.
    max_tokens: at most so many new ones.
    temperature, top_k, top_p, min_p, seed: as in `Sampling`.
    budget: mean experts asked for; None: the trained budget.
    max_experts: no token takes more; None: the method's own most.
    stop: strings that end the text and are not part of it; they need the engine's `decode`.
    stop_token: an id that ends it, and is its last token; -1: none.
    top: so many of the likeliest tokens come beside each drawn one, and beside each that is scored.
    log_probs_from: the prompt's tokens are scored from this one on, at least the second (1); None: none is.
  """

  prompt: Sequence[int]
  max_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  budget: float | None = None
  max_experts: int | None = None
  stop: tuple[str, ...] = ()
  stop_token: int = -1
  top: int = 0
  log_probs_from: int | None = None

  def check(self, config: Config) -> None:
    """Raises UserError, a line that names the field, if no model of this configuration could serve it."""
    routing = config.routing
    if len(self.prompt) < 1:
      raise UserError("prompt: wanted at least one token")
    vocab_size = config.data.vocab_size
    if not 0 <= np.min(self.prompt) <= np.max(self.prompt) < vocab_size:
      raise UserError(f"prompt: wanted ids from 0 to {vocab_size - 1}")
    self._check_range("max_tokens", 1, _MOST)
    self._check_range("temperature", 0, _MOST)
    self._check_range("top_k", 0, _MOST)
    self._check_range("top_p", 0, 1)
    self._check_range("min_p", 0, 1)
    self._check_range("seed", 0, _MOST)
    if self.budget is not None:
      self._check_range("budget", *routing.budgets)
    if self.max_experts is not None:
      self._check_range("max_experts", max(routing.k_min, 1), _MOST)
    self._check_range("stop_token", -1, vocab_size - 1)
    self._check_range("top", 0, TOP)
    if self.log_probs_from is not None:
      self._check_range("log_probs_from", 1, len(self.prompt))
    if not all(self.stop):
      raise UserError('stop="": wanted text')

  def _check_range(self, name: str, low: float, high: float) -> None:
    value = getattr(self, name)
    # Written so that a NaN fails too; infinity is no setting either.
    if not (low <= value <= high and math.isfinite(value)):
      wanted = f"{low:g}" if low == high else f"from {low:g}" + (f" to {high:g}" if high < _MOST else "")
      raise UserError(f"{name}={value}: wanted a number {wanted}")
