"""Generation: chunked prefill, and continuous batching over a fixed number of slots.

A request gets a free slot, into which its prompt is read in chunks, beside a few other prompts; from there on it
decodes beside all others, and leaves when it is done. Whatever comes, few programs are compiled: chunks of prompts, in
up to four sizes, and some steps of decoding, whose tokens come to the host together.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.infer import programs
from moe_lab.infer.cache import cache_bytes, empty_cache, full_cache_bytes
from moe_lab.infer.offload import Offloaded
from moe_lab.infer.placement import check_mesh, served, shardings
from moe_lab.infer.request import Request
from moe_lab.infer.sampling import Sampling
from moe_lab.infer.text import TextStream
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import RouterState
from moe_lab.routing.registry import make_router

READERS = 4  # prompts that are read together: their experts' weights are fetched once
SHORT = 32  # tokens of a short chunk: most requests to a server are a line or two, and padding costs as much as text


class PromptScores(NamedTuple):
  """What the model makes of a prompt of P tokens that is scored from token F on.

  Attributes:
    log_prob: float32 [P - F], of each token behind those before it, in nats.
    greedy: bool [P - F], whether it is the likeliest.
    experts: float32 [P], mean over layers of the experts spent on computing it.
    top: of each scored token, as in `Token`.
  """

  log_prob: np.ndarray
  greedy: np.ndarray
  experts: np.ndarray
  top: list[tuple[tuple[int, float], ...]]


class Token(NamedTuple):
  """One generated token.

  Attributes:
    token: its id.
    log_prob: of the token under the model at temperature 1 and without filters, in nats.
    experts: mean over layers of the experts spent on computing it.
    text: what can be shown now that it is there; empty without the engine's `decode`.
    finish: what ended the response with this token: stop | length; None: more are to come.
    top: the likeliest tokens and their log-probabilities, as many as the request wants.
    prompt: of a response's first token, where the request wants its prompt scored.
  """

  token: int
  log_prob: float
  experts: float
  text: str
  finish: str | None
  top: tuple[tuple[int, float], ...] = ()
  prompt: PromptScores | None = None


@dataclasses.dataclass
class _Serving:
  """A request; `read` of its prompt's tokens are in the cache, `made` tokens were delivered.

  Of a prompt that is scored, chunk by chunk: `experts` of all its tokens, and `scores` from the first chunk on that
  says something about a token to be scored.
  """

  ticket: int
  request: Request
  stream: TextStream | None
  read: int = 0
  made: int = 0
  experts: list[np.ndarray] = dataclasses.field(default_factory=list)
  scores: list[programs.Scores] = dataclasses.field(default_factory=list)

  @property
  def reading(self) -> bool:
    """Whether there is more of the prompt."""
    return self.read < len(self.request.prompt)

  @property
  def scored(self) -> bool:
    """Whether the next token of the prompt, or one that was read already, is to be scored."""
    return self.request.log_probs_from is not None and self.request.log_probs_from <= self.read

  def prompt_scores(self) -> PromptScores:
    """Returns what was found, once the prompt is read."""
    num = len(self.request.prompt) - self.request.log_probs_from
    # The last token's successor is drawn, and not the prompt's.
    found = (np.concatenate(parts)[-num - 1 : -1] for parts in zip(*self.scores, strict=True))
    log_prob, greedy, top_token, top_log_prob = found
    tops = [_top(self.request, *row) for row in zip(top_token, top_log_prob, strict=True)]
    return PromptScores(log_prob, greedy, np.concatenate(self.experts), tops)


def _top(request: Request, token_K: np.ndarray, log_prob_K: np.ndarray) -> tuple[tuple[int, float], ...]:
  """Returns as many of the likeliest tokens as a request wants."""
  pairs = zip(token_K[: request.top].tolist(), log_prob_K[: request.top].tolist(), strict=True)
  return tuple(pairs)


class Engine:
  """Serves requests with fixed parameters.

  What a request gets does not depend, up to rounding, on which others are served, but for `steady`, which shares
  experts among them. (Rounding is enough to change the draws of `random_k`.)
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
    mesh: jax.sharding.Mesh | None = None,
    resident_experts: int | Sequence[int] | None = None,
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
      steady: hold each decoding step's expert rows per layer to slots * budget, rounded up, hardest tokens first, and
        read one chunk of one prompt between steps, in chunk * budget rows, so that no prompt makes the others wait
        long. Tokens of a chunk share its rows whichever comes first, so results depend on where chunks end.
      budget: of requests that ask for none, and of `steady`; None: the trained budget.
      decode: turns tokens into text.
      mesh: of devices that share the parameters, the slots and their cache; None: one device.
      resident_experts: so many of each layer stay on the one device, and others are fetched from the host when they are
        taken (`offload.py`); None: all are there.

    Raises:
      UserError: the routing method is not causal, the mesh does not divide the slots, or experts can't be offloaded.
    """
    routing = config.routing
    if not make_router(routing).causal:
      raise UserError(
        f"routing.method={routing.method} cannot decode: its choice of experts sees later tokens; "
        "wanted a causal method"
      )
    self._config, self._decode_text = config, decode
    self._params, self._router_state = served(params, config.model), router_state
    self.slots, self.capacity, self.chunk, self.steady = slots, capacity, chunk, steady
    self.budget = routing.mean_count if budget is None else budget
    self._readers = 1 if steady else min(slots, READERS)
    self._sizes = [(self._readers, chunk)]  # of chunks: prompts, and tokens of each
    if mesh is None:  # which would have to divide every size
      self._sizes = sorted(itertools.product({1, self._readers}, {min(SHORT, chunk), chunk}), key=math.prod)
    self._shares = 1 if mesh is None else mesh.shape["model"]
    empty = functools.partial(empty_cache, config.model, slots, capacity, chunk, self._shares)
    placed = {}
    if mesh is None:
      # Placed, as what programs return is where parameters are: else the first calls are compiled for by themselves.
      self._cache, self._slots = jax.device_put((empty(), programs.free_slots(slots)), jax.devices()[0])
    else:
      check_mesh(mesh, slots, self._readers, chunk)
      by_name, by_ring, by_slot = shardings(mesh, self._params, slots)
      self._params = jax.device_put(self._params, by_name)
      self._cache = jax.jit(empty, out_shardings=by_ring)()
      self._slots = jax.device_put(programs.free_slots(slots), by_slot)
      placed = dict(out_shardings=(by_ring, by_slot, None))

    def rows(tokens):
      return math.ceil(tokens * self.budget) if steady else None

    # The cache and the slots are updated in place.
    model = Transformer(config, mesh, unrolled=True)

    def compiled(program, *fixed):
      return jax.jit(functools.partial(program, model, *fixed), donate_argnums=(2, 3), **placed)

    most = rows(self._readers * chunk)
    self.offloaded: Offloaded | None = None
    if resident_experts is None:
      self._read = {scored: compiled(programs.read, most, scored) for scored in (False, True)}
      self._decode = compiled(programs.decode, rows(slots), steps)
    else:
      if mesh is not None:
        raise ValueError("experts are offloaded from one device: wanted no mesh")
      self.offloaded = Offloaded(config, self._params, resident_experts)
      self._params = self.offloaded.params
      self._read = {scored: functools.partial(self.offloaded.read, most, scored) for scored in (False, True)}
      self._decode = functools.partial(self.offloaded.decode, rows(slots), steps)

    self._waiting: collections.deque[_Serving] = collections.deque()
    self._serving: list[_Serving | None] = [None] * slots
    self._next_ticket = 0
    self._generating = False

  @property
  def cache_bytes(self) -> int:
    """Bytes of the slots' cache, on all devices together."""
    return cache_bytes(self._config.model, self.slots, self.capacity, self.chunk, self._shares)

  @property
  def full_cache_bytes(self) -> int:
    """What they would be if every KV group kept every position."""
    return full_cache_bytes(self._config.model, self.slots, self.capacity)

  def check(self, request: Request) -> None:
    """Raises UserError if this engine can't serve the request."""
    request.check(self._config)
    if len(request.prompt) + request.max_tokens > self.capacity:
      most = f"at most {self.capacity - len(request.prompt)} with a prompt of {len(request.prompt)}"
      raise UserError(
        f"max_tokens={request.max_tokens}: wanted {most}, since the engine's sequences have {self.capacity}"
      )
    if request.stop and self._decode_text is None:
      raise ValueError("stop strings need the engine's `decode`")

  def submit(self, request: Request) -> int:
    """Queues a request; returns its ticket, by which `step` names it. Raises as `check`."""
    if self._generating:
      raise ValueError("`generate` serves its own requests only; with more to come: `submit` and `step`")
    self.check(request)
    ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
    stream = self._decode_text and TextStream(self._decode_text, request.stop, request.prompt)
    self._waiting.append(_Serving(ticket, request, stream))
    return ticket

  @property
  def busy(self) -> bool:
    """Whether there is anything to do."""
    return bool(self._waiting) or any(self._serving)

  @property
  def num_waiting(self) -> int:
    """Requests without a slot."""
    return len(self._waiting)

  @property
  def num_serving(self) -> int:
    """Requests with one."""
    return sum(serving is not None for serving in self._serving)

  def cancel(self, ticket: int) -> None:
    """Forgets a request, if it is still there: nothing more comes of it, and its slot is free."""
    self._waiting = collections.deque(serving for serving in self._waiting if serving.ticket != ticket)
    # What decoding finds in a slot that serves nobody it leaves alone.
    self._serving = [None if serving and serving.ticket == ticket else serving for serving in self._serving]

  @property
  def reading(self) -> bool:
    """Whether prompts are read in the next step."""
    return bool(self._waiting and None in self._serving) or any(s and s.reading for s in self._serving)

  def step(self) -> list[tuple[int, Token]]:
    """Reads prompts into free slots, then decodes up to `steps` tokens of each sequence; returns what came of it."""
    made = []
    self._admit()  # once: those that come and go quickly must not keep the others from decoding
    while reading := self._being_read():
      decoding = self._decoding_B().any()
      made += self._read_on(reading)
      if self.steady and decoding:
        break
    return made + (self._decode_on() if self._decoding_B().any() else [])

  def warm_up(self) -> None:
    """Compiles all that this engine will need, so that no request waits for that; nothing may be under way."""
    entry = self._entry(Request([0]))
    for size, scored in [(size, False) for size in self._sizes] + [(self._sizes[-1], True)]:
      self._run_read(self._chunk(size, [entry]), scored)
    self._decode_on()

  def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Token]]:
    """Yields (index of the request, token) as tokens come, of all requests at once; left early, it forgets the rest.

    Raises:
      UserError: a request can't be served; none was begun then.
    """
    if self.busy:
      raise ValueError("`generate` wants an engine that serves nobody; beside others: `submit` and `step`")
    requests = list(requests)
    for request in requests:
      self.check(request)
    index_of = {self.submit(request): index for index, request in enumerate(requests)}
    self._generating = True
    try:
      while self.busy:
        for ticket, token in self.step():
          yield index_of[ticket], token
    finally:
      self._generating = False
      for ticket in index_of:
        self.cancel(ticket)

  def _admit(self) -> None:
    """Gives free slots to who waits."""
    for slot, serving in enumerate(self._serving):
      if serving is None and self._waiting:
        self._serving[slot] = self._waiting.popleft()

  def _being_read(self) -> list[int]:
    """Returns the slots whose prompts are read next."""
    reading = [slot for slot, serving in enumerate(self._serving) if serving and serving.reading]
    return sorted(reading, key=lambda slot: self._serving[slot].ticket)[: self._readers]

  def _decoding_B(self) -> np.ndarray:
    return np.array([serving is not None and not serving.reading for serving in self._serving])

  def _read_on(self, slots: list[int]) -> list[tuple[int, Token]]:
    """Reads one chunk of each slot's prompt; those read to the end give their first token."""
    reading, parts = [self._serving[slot] for slot in slots], []
    for serving in reading:
      parts.append(range(serving.read, min(serving.read + self.chunk, len(serving.request.prompt))))
      serving.read = parts[-1].stop
    scored = any(serving.scored for serving in reading)
    longest = max(map(len, parts))
    # Scoring is for many prompts at a time: it is compiled for the largest size only.
    sizes = self._sizes[-1:] if scored else self._sizes
    size = next((rows, length) for rows, length in sizes if rows >= len(parts) and length >= longest)
    chunk = self._chunk(size, [self._entry(serving.request) for serving in reading])
    for r, (serving, part) in enumerate(zip(reading, parts, strict=True)):
      prompt = serving.request.prompt
      following = prompt[part.start + 1 : part.stop + 1]
      chunk.token_RL[r, : len(part)] = prompt[part.start : part.stop]
      chunk.next_RL[r, : len(following)] = following
      chunk.length_R[r], chunk.offset_R[r], chunk.slot_R[r] = len(part), part.start, slots[r]
      chunk.last_R[r] = not serving.reading
    found = self._run_read(chunk, scored)
    wanting = [r for r, serving in enumerate(reading) if serving.request.log_probs_from is not None]
    last = np.nonzero(chunk.last_R)[0]
    if not last.size and not wanting:
      return []
    made, experts_RL, scores = jax.device_get(found)
    for r in wanting:
      serving, num = reading[r], len(parts[r])
      serving.experts.append(experts_RL[r, :num])
      if serving.scored:
        serving.scores.append(programs.Scores(*(values[r, :num] for values in scores)))
    return [self._deliver(slots[r], made, r) for r in last]

  def _chunk(self, size: tuple[int, int], entries: list[programs.Slots]) -> programs.Chunk:
    """Returns a chunk of nothing yet, for so many prompts of so many tokens; `entries`: of the first of them."""
    token_RL, next_RL = np.zeros((2, *size), np.int32)
    length_R, offset_R, slot_R = np.zeros((3, size[0]), np.int32)
    entries = entries + entries[:1] * (size[0] - len(entries))  # rows without a prompt join nothing
    entry_R = jax.tree.map(lambda old, *new_R: np.asarray(new_R, old.dtype), self._slots, *entries)
    return programs.Chunk(token_RL, next_RL, length_R, offset_R, slot_R, np.zeros(size[0], bool), entry_R)

  def _run_read(self, chunk: programs.Chunk, scored: bool):
    """Returns what `programs.read` gives but for the cache and the slots, which become this engine's."""
    self._cache, self._slots, found = self._read[scored](
      self._params, self._router_state, self._cache, self._slots, chunk
    )
    return found

  def _entry(self, request: Request) -> programs.Slots:
    """Returns a request as an entry of the slots."""
    return programs.Slots(
      token=0,
      position=len(request.prompt),
      drawn=0,
      left=request.max_tokens,
      stop=request.stop_token,
      budget=self.budget if request.budget is None else request.budget,
      experts=request.max_experts or self._config.routing.slots,
      top=request.top,
      sampling=Sampling(request.temperature, request.top_k, request.top_p, request.min_p, request.seed),
    )

  def _decode_on(self) -> list[tuple[int, Token]]:
    self._cache, self._slots, made = self._decode(
      self._params, self._router_state, self._cache, self._slots, self._decoding_B()
    )
    made = jax.device_get(made)
    delivered = []
    for step, slot in zip(*np.nonzero(made.there), strict=True):
      if self._serving[slot]:  # a stop string may have ended it within these steps
        delivered.append(self._deliver(slot, made, (step, slot)))
    return delivered

  def _deliver(self, slot: int, made: programs.Made, place) -> tuple[int, Token]:
    """Turns the token at a place of what was made into what the caller gets; frees the slot after the last."""
    serving, token = self._serving[slot], int(made.token[place])
    request, stream, text, finish = serving.request, serving.stream, "", None
    serving.made += 1
    prompt = serving.prompt_scores() if serving.made == 1 and request.log_probs_from is not None else None
    if token == request.stop_token:
      finish = "stop"
    elif stream:
      text = stream.push(token)
      finish = "stop" if stream.stopped else None
    if finish is None and serving.made == request.max_tokens:
      finish = "length"
    if finish:
      self._serving[slot] = None
      text += stream.finish() if stream else ""
    top = _top(request, made.top_token[place], made.top_log_prob[place])
    numbers = float(made.log_prob[place]), float(made.experts[place])
    return serving.ticket, Token(token, *numbers, text, finish, top, prompt)
