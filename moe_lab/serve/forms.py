"""From tokens to what OpenAI's clients read: whole replies and chunks of a stream."""

import codecs
import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

from moe_lab.infer.engine import Token
from moe_lab.infer.request import Request
from moe_lab.serve.fields import ChatFields, CompletionFields, GenerationFields
from moe_lab.serve.served import ServedModel

LEAST_LOG_PROB = -9999.0  # stands for minus infinity, which JSON has not


class Scored(NamedTuple):
  """A token with its log-probability (None: it begins a text) and the likeliest ones in its place."""

  token: int
  log_prob: float | None
  top: Sequence[tuple[int, float]] = ()


class _Choice:
  """One response as far as it has come; `prompt_text` is what goes before it."""

  def __init__(self, request: Request, prompt_text: str):
    self.request, self.prompt_text = request, prompt_text
    self.begun, self.finish = False, None
    self.texts: list[str] = []
    self.scored: list[Scored] = []
    self.experts: list[float] = []
    self.experts_sum = self.looked_back = 0.0  # of all tokens: experts, and tokens before it
    self.offset = 0  # characters of the tokens whose log-probabilities were told
    self.decoder = codecs.getincrementaldecoder("utf-8")("replace")


class Form:
  """Writes the replies to one request. A subclass says how a choice is spelt.

  Attributes:
    prefix, whole_object, chunk_object: what the protocol calls its replies.
  """

  prefix = whole_object = chunk_object = ""

  def __init__(
    self,
    served: ServedModel,
    fields: GenerationFields,
    requests: Sequence[Request],
    *,
    prompt_texts: Sequence[str] | None = None,
    hidden: bool = False,
  ):
    """Sets up empty choices.

    Args:
      served: the model.
      fields: of the request.
      requests: one for each choice, the n of a prompt side by side.
      prompt_texts: of each prompt, to be part of the reply; None: they are not.
      hidden: whether the responses' tokens are not told: no new ones were asked for.
    """
    n = fields.n or 1
    self._served, self._fields, self._hidden = served, fields, hidden
    self._echo = prompt_texts is not None
    self._choices = [_Choice(r, prompt_texts[i // n] if self._echo else "") for i, r in enumerate(requests)]
    self._prompt_tokens = sum(len(request.prompt) for request in requests[::n])
    self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": served.name}
    self._with_usage = bool(fields.stream_options and fields.stream_options.include_usage)

  def collect(self, index: int, token: Token) -> None:
    """Takes the next token of a choice into the whole reply."""
    text, scored = self._add(index, token)
    self._choices[index].texts.append(text)
    self._choices[index].scored += scored

  def whole(self) -> dict:
    """Returns the reply, once every choice has ended."""
    choices = []
    for index, choice in enumerate(self._choices):
      log_probs = self._log_probs(choice, choice.scored) if self._scores else None
      said = self._said("".join(choice.texts))
      choices.append({"index": index, **said, "logprobs": log_probs, "finish_reason": choice.finish})
    compute = self._compute(self._choices) | {
      "experts": [round(value, 4) for choice in self._choices for value in choice.experts],
      "tokens": [len(choice.experts) for choice in self._choices],
    }
    return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage(), "compute": compute}

  def chunk(self, index: int, token: Token) -> dict:
    """Returns the event of a choice's next token, with the compute of the choice so far."""
    choice = self._choices[index]
    first = not choice.begun
    text, scored = self._add(index, token)
    compute = self._compute([choice]) | {"experts": [] if self._hidden else [round(token.experts, 4)]}
    log_probs = self._log_probs(choice, scored) if self._scores else None
    said = self._said_next(text, first)
    told = {"index": index, **said, "logprobs": log_probs, "finish_reason": choice.finish}
    chunk = {**self._head, "object": self.chunk_object, "choices": [told], "compute": compute}
    return chunk | {"usage": None} if self._with_usage else chunk

  def last_chunk(self) -> dict | None:
    """Returns the event that tells the usage; None where it was not asked for."""
    if not self._with_usage:
      return None
    compute = self._compute(self._choices)
    return {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage(), "compute": compute}

  def _add(self, index: int, token: Token) -> tuple[str, list[Scored]]:
    """Takes a token in; returns the text and the scores that are new with it."""
    choice, text, scored = self._choices[index], "", []
    if not choice.begun and self._echo:
      text, scored = choice.prompt_text, self._prompt_scores(choice, token)
    choice.begun, choice.finish = True, token.finish
    if self._hidden:
      choice.finish = "length"
    else:
      choice.looked_back += len(choice.request.prompt) + len(choice.experts)
      choice.experts_sum += token.experts
      choice.experts.append(token.experts)
      text += token.text
      scored.append(Scored(token.token, token.log_prob, token.top))
    return text, scored

  def _prompt_scores(self, choice: _Choice, token: Token) -> list[Scored]:
    if not self._scores:
      return []
    prompt, scores = choice.request.prompt, token.prompt
    rest = map(Scored, prompt[1:], map(float, scores.log_prob), scores.top)
    return [Scored(prompt[0], None), *rest]

  def _compute(self, choices: Sequence[_Choice]) -> dict:
    compute = self._fields.compute
    made = sum(len(choice.experts) for choice in choices)
    mean = sum(choice.experts_sum for choice in choices) / made if made else None
    context = sum(choice.looked_back for choice in choices) / made if made else None
    return {
      "budget": self._served.budget if compute is None or compute.budget is None else compute.budget,
      "max_experts": compute and compute.max_experts,
      "mean_experts": mean,
      "flops_per_token": self._served.flops_per_token(mean, context) if made else None,
    }

  def _usage(self) -> dict:
    made = sum(len(choice.experts) for choice in self._choices)
    return {
      "prompt_tokens": self._prompt_tokens,
      "completion_tokens": made,
      "total_tokens": self._prompt_tokens + made,
    }

  @property
  def _scores(self) -> bool:
    """Whether log-probabilities are told."""
    raise NotImplementedError

  def _log_probs(self, choice: _Choice, scored: Sequence[Scored]) -> dict:
    """Returns new scores as they are spelt."""
    raise NotImplementedError

  def _said(self, text: str) -> dict:
    """Returns a choice's text as a whole reply has it."""
    raise NotImplementedError

  def _said_next(self, text: str, first: bool) -> dict:
    """Returns the next piece of it as a chunk has it."""
    raise NotImplementedError


def _number(log_prob: float) -> float:
  return round(max(log_prob, LEAST_LOG_PROB), 6)


class CompletionForm(Form):
  """Of /v1/completions."""

  prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"
  _fields: CompletionFields

  @property
  def _scores(self) -> bool:
    return self._fields.logprobs is not None

  def _prompt_scores(self, choice: _Choice, token: Token) -> list[Scored]:
    scored = super()._prompt_scores(choice, token)
    # The token that begins every text is no part of one that came as text.
    came_as_text = isinstance(self._fields.prompt, str) or isinstance(self._fields.prompt[0], str)
    return scored[1:] if came_as_text else scored

  def _log_probs(self, choice: _Choice, scored: Sequence[Scored]) -> dict:
    piece, offsets = self._served.piece, []
    for one in scored:
      data, before = self._served.tokenizer.token_bytes(one.token), choice.offset
      choice.offset += len(choice.decoder.decode(data))
      own = data.decode(errors="ignore")
      # One that is text by itself also ends a broken character before it.
      offsets.append(choice.offset - len(own) if own.encode() == data else before)
    return {
      "tokens": [piece(one.token) for one in scored],
      "token_logprobs": [None if one.log_prob is None else _number(one.log_prob) for one in scored],
      "top_logprobs": [self._top(one) for one in scored] if self._fields.logprobs else None,
      "text_offset": offsets,
    }

  def _top(self, one: Scored) -> dict | None:
    """Returns the likeliest tokens, and the one that was taken."""
    if one.log_prob is None:
      return None
    likely = {}
    for token, log_prob in (*one.top, (one.token, one.log_prob)):
      likely.setdefault(self._served.piece(token), _number(log_prob))  # of two that read alike the likelier
    return likely

  def _said(self, text: str) -> dict:
    return {"text": text}

  def _said_next(self, text: str, first: bool) -> dict:
    return {"text": text}


class ChatForm(Form):
  """Of /v1/chat/completions."""

  prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
  _fields: ChatFields

  @property
  def _scores(self) -> bool:
    return bool(self._fields.logprobs or self._fields.top_logprobs)

  def _log_probs(self, choice: _Choice, scored: Sequence[Scored]) -> dict:
    content = [
      self._likely(one.token, one.log_prob) | {"top_logprobs": [self._likely(*other) for other in one.top]}
      for one in scored
    ]
    return {"content": content, "refusal": None}

  def _likely(self, token: int, log_prob: float) -> dict:
    data = self._served.tokenizer.token_bytes(token)
    return {"token": self._served.piece(token), "logprob": _number(log_prob), "bytes": list(data)}

  def _said(self, text: str) -> dict:
    return {"message": {"role": "assistant", "content": text, "refusal": None}}

  def _said_next(self, text: str, first: bool) -> dict:
    return {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
