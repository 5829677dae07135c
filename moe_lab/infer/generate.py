"""Token-by-token generation with a key/value cache, one sequence at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.infer.cache import empty_cache
from moe_lab.infer.sampling import sample
from moe_lab.nn.transformer import Transformer, head, unstack_layers
from moe_lab.routing.base import RouterState
from moe_lab.routing.registry import make_router

MIN_LENGTH = 64  # cache lengths are powers of two from here, so that few are ever compiled


class Step(NamedTuple):
  """One generated token.

  Attributes:
    token: its id.
    log_prob: of the token under the model at temperature 1, in nats.
    experts: mean over layers of the experts spent on computing it.
  """

  token: int
  log_prob: float
  experts: float


class Generator:
  """Generates from fixed parameters; each cache length is compiled once."""

  def __init__(self, config: Config, params, router_state: RouterState):
    """Args: config: of the model; params: its; router_state: with the greedy rule's calibration.

    Raises:
      UserError: the routing method is not causal.
    """
    if not make_router(config.routing).causal:
      raise UserError(
        f"routing.method={config.routing.method} cannot decode: its choice of experts sees later tokens; "
        "wanted a causal method"
      )
    self._config, self._params, self._router_state = config, unstack_layers(params), router_state
    self._model = Transformer(config, unrolled=True)
    self._advance = jax.jit(self._forward, donate_argnums=2)
    self._sample = jax.jit(_sample)

  def _forward(self, params, router_state, cache, token_BL, segment_BL, offset, last, budget):
    """Returns the logits after position `last` of the input, the experts it took, and the cache."""
    out = self._model.apply(
      {"params": params}, token_BL, segment_BL, jnp.full(1, budget), router_state, cache=cache, offset=offset
    )
    return head(out.hidden_BLD[0, last], out.head_VD), out.stats.count_T[:, last].mean(), out.cache

  def prefill(self, prompt: np.ndarray, length: int, budget: float):
    """Reads a prompt into a fresh cache of `length` positions; returns logits_V, experts, cache."""
    width = min(_power_of_two(len(prompt)), length)
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(prompt)] = prompt
    segment_BL = (np.arange(width) < len(prompt)).astype(np.int32)[None]
    cache = empty_cache(self._config.model, 1, length)
    return self._advance(self._params, self._router_state, cache, padded, segment_BL, 0, len(prompt) - 1, budget)

  def generate(
    self,
    prompt: np.ndarray,
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    budget: float | None = None,
    stop: int | None = None,
  ) -> Iterator[Step]:
    """Yields up to `max_tokens` tokens that follow `prompt`, as they come.

    Args:
      prompt: int32 [n], n >= 1, begin token included.
      max_tokens: at most so many.
      temperature: 0 is greedy decoding.
      top_p: nucleus.
      seed: of sampling.
      budget: mean experts asked for; None: the trained budget.
      stop: an id that ends the text; it is yielded too.
    """
    budget = self._config.routing.budget if budget is None else budget
    length = _power_of_two(len(prompt) + max_tokens)
    logits_V, experts, cache = self.prefill(prompt, length, budget)
    for index in range(max_tokens):
      token, log_prob = self._sample(seed, index, logits_V, temperature, top_p)
      yield Step(int(token), float(log_prob), float(experts))
      if int(token) == stop or index + 1 == max_tokens:
        return
      one = jnp.ones((1, 1), jnp.int32)
      logits_V, experts, cache = self._advance(
        self._params, self._router_state, cache, token[None, None], one, len(prompt) + index, 0, budget
      )


def _sample(seed, index, logits_V, temperature, top_p):
  """The token after `index` others, and its log-probability at temperature 1."""
  token = sample(jax.random.fold_in(jax.random.key(seed), index), logits_V, temperature, top_p)
  return token, jax.nn.log_softmax(logits_V)[token]


def _power_of_two(n: int) -> int:
  return max(MIN_LENGTH, 1 << (n - 1).bit_length())
