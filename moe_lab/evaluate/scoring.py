"""Asks a model many things at once: how likely texts are, and what it writes on; with what each answer cost.

Everything goes through the engine's continuous batching. What is too long loses its beginning, by the rules of
lm-evaluation-harness's own Hugging Face model.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_lab.config.schema import Config
from moe_lab.data.tokenizer import Tokenizer
from moe_lab.errors import UserError
from moe_lab.evaluate.compute import Compute, Meter
from moe_lab.infer.engine import Engine, Token
from moe_lab.infer.request import Request
from moe_lab.infer.responses import Response
from moe_lab.infer.sampling import TOP
from moe_lab.io.progress import Count

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation: token ids, neither is empty


class Scored(NamedTuple):
  """A continuation's log-probability in nats, whether it is what greedy decoding gives, and what scoring it cost."""

  log_prob: float
  greedy: bool
  compute: Compute


class Written(NamedTuple):
  """What was written on from a prompt, without the stop string, and what that cost."""

  text: str
  compute: Compute


class Scorer:
  """A model that answers in batches.

  Attributes:
    tokenizer: of the model.
    context: tokens of a sequence, at most.
  """

  def __init__(self, config: Config, tokenizer: Tokenizer, make_engine: Callable[[int], Engine], context: int):
    """Puts nothing on the device yet.

    Args:
      config: of the model.
      tokenizer: of the model.
      make_engine: returns an engine for sequences of so many tokens, or more.
      context: tokens of a sequence, at most; what is longer loses its beginning.
    """
    self.tokenizer, self.context = tokenizer, context
    self._make_engine, self._engine = make_engine, None
    self._meter = Meter(config, context)

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text, with the one that begins it where the tokenizer's own files say so."""
    return [self.tokenizer.bos_id] * self.tokenizer.begins_texts + self.tokenizer.encode(text).tolist()

  def pair(self, context: str, continuation: str) -> Pair:
    """Returns the tokens of a context that is not empty, and of what goes on from it.

    They are cut as one text, and spaces at the context's end belong to the continuation, as in training.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
      context, continuation = context[:-spaces], context[-spaces:] + continuation
    begin = self.encode(context)
    # Where the last token of the context goes on into the continuation, there may be no border in the whole.
    return begin, self.encode(context + continuation)[len(begin) :] or self.tokenizer.encode(continuation).tolist()

  def log_likelihoods(self, pairs: Sequence[Pair], budget: float | None = None) -> list[Scored]:
    """Scores continuations, each behind its context.

    A context with several continuations of one token each, as of a choice between letters, is read once for all that
    are among its `TOP` likeliest next tokens; the first of them is charged for that.

    Args:
      pairs: what is longer than `context` + 1 tokens together loses its beginning.
      budget: mean experts asked for; None: the engine's.

    Raises:
      UserError: a continuation alone is longer than `context`.
    """
    sequences, by_context = [], collections.defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
      if len(continuation) > self.context:
        raise UserError(f"--context={self.context}: wanted at least {len(continuation)}, a continuation's tokens")
      sequences.append([*context, *continuation][-(self.context + 1) :])
      if len(continuation) == 1:
        by_context[tuple(sequences[-1][:-1])].append(index)
    found = self._read_once(sequences, {key: at for key, at in by_context.items() if len(at) > 1}, budget)

    rest = [index for index in range(len(pairs)) if index not in found]
    begins = [len(sequences[index]) - len(pairs[index][1]) for index in rest]
    requests = [
      Request(sequences[index], max_tokens=1, log_probs_from=begin, budget=budget)
      for index, begin in zip(rest, begins, strict=True)
    ]
    for at, token in self._serve(requests, "scored"):
      scores = token.prompt
      # The last token was read only to have the one before it scored.
      compute = self._meter.count(scores.experts[:-1], begins[at] - 1)
      log_prob = float(np.sum(scores.log_prob, dtype=np.float64))
      found[rest[at]] = Scored(log_prob, bool(np.all(scores.greedy)), compute)
    return [found[index] for index in range(len(pairs))]

  def _read_once(self, sequences, by_context: dict[tuple[int, ...], list[int]], budget) -> dict[int, Scored]:
    """Returns by index the sequences whose last token is among the likeliest of a context that several share."""
    found, groups = {}, list(by_context.values())
    requests = [
      Request(context, max_tokens=1, top=TOP, log_probs_from=len(context), budget=budget) for context in by_context
    ]
    for at, token in self._serve(requests, "contexts read"):
      likeliest, compute = dict(token.top), self._meter.count(token.prompt.experts, len(token.prompt.experts) - 1)
      for index in groups[at]:
        wanted = sequences[index][-1]
        if wanted in likeliest:
          found[index] = Scored(likeliest[wanted], wanted == token.top[0][0], compute)
          compute = Compute()
    return found

  def write(self, prompts: Sequence[Sequence[int]], settings: Sequence[dict]) -> list[Written]:
    """Writes on from prompts.

    Args:
      prompts: token ids; of what is longer than `context` less the new tokens the beginning is lost.
      settings: for each what its `Request` has beside the prompt; max_tokens at least.

    Raises:
      UserError: there is no room for a prompt beside max_tokens.
    """
    requests = []
    for prompt, changes in zip(prompts, settings, strict=True):
      room = self.context - changes["max_tokens"]
      if room < 1:
        raise UserError(f"--context={self.context}: wanted more than {changes['max_tokens']}, the tokens to generate")
      prompt = prompt[-room:]
      requests.append(Request(prompt, log_probs_from=len(prompt), stop_token=self.tokenizer.eos_id, **changes))
    responses = [Response() for _ in requests]
    read = [()] * len(requests)
    for at, token in self._serve(requests, "written"):
      responses[at].add(token)
      if token.prompt is not None:
        read[at] = token.prompt.experts
    return [
      # A response's first token is predicted by the prompt's last one, whose experts stand with it.
      Written(response.text, self._meter.count([*experts[:-1], *response.experts], len(experts) - 1))
      for response, experts in zip(responses, read, strict=True)
    ]

  def _serve(self, requests: Sequence[Request], what: str) -> Iterator[tuple[int, Token]]:
    """Yields (index of the request, token) as they come, the longest prompts first, which then fill their batches."""
    if not requests:
      return
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    capacity = self._engine.capacity if self._engine else 0
    if capacity < longest:
      self._engine = None  # before there is another one
      # Every new size is compiled anew: few sizes, far apart.
      self._engine = self._make_engine(max(longest, min(4 * capacity, self.context)))
    with Count(what, len(requests)) as count:
      for at, token in self._engine.generate([requests[index] for index in order]):
        yield order[at], token
        if token.finish:
          count.add()
