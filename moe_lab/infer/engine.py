"""Generation: chunked prefill, and continuous batching over a fixed number of slots.

A request gets a free slot, its prompt is read in chunks into a cache of its own, which then becomes the slot's; from
there on it decodes beside the others and leaves when it is done. Three programs are compiled, whatever comes: a chunk
of prefill, joining, and some steps of decoding, whose tokens come to the host together.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.infer.cache import cache_bytes, empty_cache, full_cache_bytes
from moe_lab.infer.sampling import Sampling, sample
from moe_lab.infer.text import TextStream
from moe_lab.nn.transformer import Transformer, head, unstack_layers
from moe_lab.routing.base import Caps, RouterState
from moe_lab.routing.registry import make_router


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


class Token(NamedTuple):
  """One generated token.

  Attributes:
    token: its id.
    log_prob: of the token under the model at temperature 1 and without filters, in nats.
    experts: mean over layers of the experts spent on computing it.
    text: what can be shown now that it is there; empty without the engine's `decode`.
    finish: what ended the response with this token: stop | length; None: more are to come.
  """

  token: int
  log_prob: float
  experts: float
  text: str
  finish: str | None


class Slots(NamedTuple):
  """The device's memory of the slots, [B].

  Attributes:
    token: int32, the last one, which is not in the cache yet.
    position: int32, where it belongs.
    drawn: int32, tokens drawn so far.
    left: int32, tokens still to draw; 0: the slot is free.
    stop: int32, id that ends the sequence.
    budget: float32, mean experts asked for.
    experts: int32, most experts of a token.
    sampling: settings.
  """

  token: jax.Array
  position: jax.Array
  drawn: jax.Array
  left: jax.Array
  stop: jax.Array
  budget: jax.Array
  experts: jax.Array
  sampling: Sampling


class Made(NamedTuple):
  """Tokens of some steps, [n, B], and whether there is one at all."""

  token: jax.Array
  log_prob: jax.Array
  experts: jax.Array
  there: jax.Array


class _Reading(NamedTuple):
  """A request whose prompt is being read."""

  ticket: int
  slot: int
  request: Request
  done: int


class Engine:
  """Serves requests with fixed parameters.

  What a request gets does not depend on which others are served, but for `steady`, which shares experts among them.
  """

  def __init__(
    self,
    config: Config,
    params,
    router_state: RouterState,
    *,
    slots: int = 1,
    capacity: int = 1024,
    chunk: int = 128,
    steps: int = 8,
    steady: bool = False,
    budget: float | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
  ):
    """Sets up empty slots.

    Args:
      config: of the model.
      params: its parameters, stacked or not.
      router_state: with the greedy rule's calibration.
      slots: sequences that are decoded together.
      capacity: most tokens of a sequence, prompt and response.
      chunk: tokens of a prompt that are read at a time.
      steps: most tokens of a sequence between two looks of the host; new requests and stop strings wait that long.
      steady: hold each step's expert rows per layer to slots * budget, rounded up, hardest tokens first, and read
        one chunk of a prompt between steps, so that no prompt makes the others wait long.
      budget: of requests that ask for none, and of `steady`; None: the trained budget.
      decode: turns tokens into text.

    Raises:
      UserError: the routing method is not causal.
    """
    routing = config.routing
    if not make_router(routing).causal:
      raise UserError(
        f"routing.method={routing.method} cannot decode: its choice of experts sees later tokens; wanted a causal method"
      )
    self._config, self._decode_text = config, decode
    self._params, self._router_state = unstack_layers(params), router_state
    self.slots, self.capacity, self.chunk, self.steps, self.steady = slots, capacity, chunk, steps, steady
    self.budget = routing.mean_count if budget is None else budget
    self._model = Transformer(config, unrolled=True)

    def cache(batch_size):
      return empty_cache(config.model, batch_size, capacity, chunk)

    self._cache, self._reading_cache = cache(slots), cache(1)
    self._slots = _no_slots(slots)
    # The caches and the slots are updated in place.
    self._read = jax.jit(self._read_chunk, donate_argnums=2)
    self._join = jax.jit(_join, donate_argnums=(0, 1))
    self._decode = jax.jit(self._decode_steps, donate_argnums=(2, 3))

    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    self._reading: _Reading | None = None
    self._serving: list[int | None] = [None] * slots
    self._streams: dict[int, TextStream | None] = {}
    self._stops: dict[int, int] = {}
    self._next_ticket = 0

  @property
  def cache_bytes(self) -> int:
    """Bytes of the slots' cache."""
    return cache_bytes(self._config.model, self.slots, self.capacity, self.chunk)

  @property
  def full_cache_bytes(self) -> int:
    """What they would be if every KV group kept every position."""
    return full_cache_bytes(self._config.model, self.slots, self.capacity)

  def submit(self, request: Request) -> int:
    """Queues a request; returns its ticket, by which `step` names it.

    Raises:
      UserError: it can't be served by this engine.
    """
    length, routing = len(request.prompt), self._config.routing
    if length < 1 or request.max_tokens < 1:
      raise UserError(f"a request of {length} + {request.max_tokens} tokens: wanted at least one of each")
    if length + request.max_tokens > self.capacity:
      raise UserError(f"a request of {length} + {request.max_tokens} tokens: wanted at most {self.capacity} in all")
    if request.max_experts is not None and request.max_experts < max(routing.k_min, 1):
      raise UserError(f"max_experts={request.max_experts}: wanted at least {max(routing.k_min, 1)}")
    if request.stop and self._decode_text is None:
      raise ValueError("stop strings need the engine's `decode`")
    ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
    self._waiting.append((ticket, request))
    return ticket

  @property
  def busy(self) -> bool:
    """Whether there is anything to do."""
    return bool(self._waiting) or self._reading is not None or self._any_served

  @property
  def _any_served(self) -> bool:
    return any(ticket is not None for ticket in self._serving)

  def step(self) -> list[tuple[int, Token]]:
    """Reads prompts into free slots, then decodes up to `steps` tokens of each sequence; returns what came of it."""
    made = []
    while self._start_reading():
      made += self._read_on()
      if self.steady and self._any_served:
        break
    return made + self._decode_on() if self._any_served else made

  def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Token]]:
    """Yields (index of the request, token) as tokens come, of all requests at once."""
    index_of = {self.submit(request): index for index, request in enumerate(requests)}
    while self.busy:
      for ticket, token in self.step():
        yield index_of[ticket], token

  def _start_reading(self) -> bool:
    if self._reading is None and self._waiting and None in self._serving:
      ticket, request = self._waiting.popleft()
      self._reading = _Reading(ticket, self._serving.index(None), request, 0)
    return self._reading is not None

  def _read_on(self) -> list[tuple[int, Token]]:
    """Reads one chunk; after the last, the request joins, and its first token is there."""
    ticket, slot, request, done = self._reading
    tokens = np.zeros((1, self.chunk), np.int32)
    part = request.prompt[done : done + self.chunk]
    tokens[0, : len(part)] = part
    entry = self._entry(request)
    logits_V, experts, self._reading_cache = self._read(
      self._params, self._router_state, self._reading_cache, tokens, done, len(part), entry.budget, entry.experts
    )
    self._reading = self._reading._replace(done=done + len(part))
    if self._reading.done < len(request.prompt):
      return []
    self._reading, self._serving[slot] = None, ticket
    self._cache, self._slots, token, log_prob = self._join(
      self._cache, self._slots, self._reading_cache, slot, entry, logits_V
    )
    stream = self._decode_text and TextStream(self._decode_text, request.stop, request.prompt)
    self._streams[ticket], self._stops[ticket] = stream, request.stop_token
    return [self._deliver(slot, token, log_prob, experts, request.max_tokens == 1)]

  def _entry(self, request: Request) -> Slots:
    """Returns a request as an entry of `Slots`."""
    sampling = Sampling(request.temperature, request.top_k, request.top_p, request.min_p, request.seed)
    return Slots(
      token=0,
      position=len(request.prompt),
      drawn=0,
      left=request.max_tokens,
      stop=request.stop_token,
      budget=self.budget if request.budget is None else request.budget,
      experts=request.max_experts or self._config.routing.slots,
      sampling=sampling,
    )

  def _decode_on(self) -> list[tuple[int, Token]]:
    live_B = np.array([ticket is not None for ticket in self._serving])
    self._cache, self._slots, made, left_B = self._decode(
      self._params, self._router_state, self._cache, self._slots, live_B
    )
    made, left_B = jax.device_get((made, left_B))
    last_B = made.there.sum(0) - 1
    delivered = []
    for step, slot in zip(*np.nonzero(made.there), strict=True):
      if self._serving[slot] is not None:  # a stop string may have ended it within these steps
        ended = left_B[slot] == 0 and step == last_B[slot]
        values = (values[step, slot] for values in made[:3])
        delivered.append(self._deliver(slot, *values, ended))
    return delivered

  def _deliver(self, slot: int, token, log_prob, experts, ended: bool) -> tuple[int, Token]:
    """Turns a token of the device into what the caller gets; frees the slot after the last."""
    ticket, token = self._serving[slot], int(token)
    stream, text, finish = self._streams[ticket], "", None
    if token == self._stops[ticket]:
      finish = "stop"
    elif stream:
      text = stream.push(token)
    if stream and stream.stopped:
      finish = "stop"
    if ended and finish is None:
      finish = "length"
    if finish:
      self._serving[slot] = None
      del self._streams[ticket], self._stops[ticket]
      text += stream.finish() if stream else ""
    return ticket, Token(token, float(log_prob), float(experts), text, finish)

  def _rows(self, tokens: int) -> jax.Array | None:
    """Returns the expert rows per layer that so many tokens may take together."""
    return jnp.int32(math.ceil(tokens * self.budget)) if self.steady else None

  def _read_chunk(self, params, router_state, cache, token_1L, offset, length, budget, experts):
    """Returns the logits after the chunk's last real token, that token's mean experts, and the cache."""
    segment_1L = (jnp.arange(self.chunk) < length).astype(jnp.int32)[None]
    out = self._model.apply(
      {"params": params}, token_1L, segment_1L, jnp.full(1, budget), router_state,
      caps=Caps(jnp.full(1, experts), self._rows(self.chunk)), cache=cache, offset=jnp.full(1, offset),
    )  # fmt: skip
    return head(out.hidden_BLD[0, length - 1], out.head_VD), out.stats.count_T[:, length - 1].mean(), out.cache

  def _decode_steps(self, params, router_state, cache, slots: Slots, live_B):
    """Draws up to `steps` tokens of each slot; none of those that are not live."""
    slots = slots._replace(left=jnp.where(live_B, slots.left, 0))
    made = Made(*(jnp.zeros((self.steps, self.slots), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32, bool)))

    def one(carry):
      step, cache, slots, made = carry
      active_B = slots.left > 0
      out = self._model.apply(
        {"params": params}, slots.token[:, None], active_B[:, None].astype(jnp.int32), slots.budget, router_state,
        caps=Caps(slots.experts, self._rows(self.slots)), cache=cache, offset=slots.position,
      )  # fmt: skip
      token_B, log_prob_B = sample(head(out.hidden_BLD[:, 0], out.head_VD), slots.drawn, slots.sampling)
      new = Made(token_B, log_prob_B, out.stats.count_T.astype(jnp.float32).mean(0), active_B)
      made = jax.tree.map(lambda all_nB, new_B: all_nB.at[step].set(new_B), made, new)
      moved = slots._replace(position=slots.position + 1)
      slots = jax.tree.map(functools.partial(jnp.where, active_B), _drawn(moved, token_B), slots)
      return step + 1, out.cache, slots, made

    def go_on(carry):
      return (carry[0] < self.steps) & jnp.any(carry[2].left > 0)

    _, cache, slots, made = jax.lax.while_loop(go_on, one, (jnp.int32(0), cache, slots, made))
    return cache, slots, made, slots.left


def _no_slots(num: int) -> Slots:
  """Returns free slots."""
  ints, floats = jnp.zeros(num, jnp.int32), jnp.zeros(num)
  return jax.tree.map(jnp.copy, Slots(ints, ints, ints, ints, ints, floats, ints, Sampling(floats, ints, floats, floats, ints)))


def _drawn(slots: Slots, token_B: jax.Array) -> Slots:
  """Returns the slots after each drew a token."""
  left_B = jnp.where(token_B == slots.stop, 0, slots.left - 1)
  return slots._replace(token=token_B, drawn=slots.drawn + 1, left=left_B)


def _join(cache, slots: Slots, read_cache, slot, entry: Slots, logits_V):
  """Puts a prompt's cache into a slot and draws the first token."""
  cache = jax.tree.map(
    lambda all_B, one: jax.lax.dynamic_update_slice_in_dim(all_B, one, slot, axis=0), cache, read_cache
  )
  entry = jax.tree.map(lambda new, old_B: jnp.asarray(new, old_B.dtype)[None], entry, slots)
  token_1, log_prob_1 = sample(logits_V[None], entry.drawn, entry.sampling)
  entry = _drawn(entry, token_1)
  slots = jax.tree.map(lambda old_B, new_1: old_B.at[slot].set(new_1[0]), slots, entry)
  return cache, slots, token_1[0], log_prob_1[0]
