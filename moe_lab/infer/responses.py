"""Whole responses, and requests as they stand in a file."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_lab.errors import UserError, did_you_mean
from moe_lab.infer.engine import Engine, Token
from moe_lab.infer.request import Request
from moe_lab.strict_json import parse


@dataclasses.dataclass
class Response:
  """Everything that came of a request.

  Attributes:
    tokens: ids.
    log_probs: of each token, in nats.
    experts: mean over layers of the experts of each token.
    text: of the tokens; a character that they only begin is not in it.
    finish: stop | length; "" while it is being written.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probs: list[float] = dataclasses.field(default_factory=list)
  experts: list[float] = dataclasses.field(default_factory=list)
  text: str = ""
  finish: str = ""

  def add(self, token: Token) -> None:
    """Takes the next token in."""
    self.tokens.append(token.token)
    self.log_probs.append(token.log_prob)
    self.experts.append(token.experts)
    self.text += token.text
    self.finish = token.finish or ""

  @property
  def mean_experts(self) -> float:
    """Experts per token and layer."""
    return sum(self.experts) / len(self.experts)

  @property
  def mean_log_prob(self) -> float:
    """In nats per token."""
    return sum(self.log_probs) / len(self.log_probs)


def finished(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[int, Response]]:
  """Yields (index of the request, response) in the order in which they finish."""
  responses: dict[int, Response] = {}
  for index, token in engine.generate(requests):
    responses.setdefault(index, Response()).add(token)
    if token.finish:
      yield index, responses.pop(index)


# What a line of a file may set, and the types that JSON gives it.
_FIELDS = {
  "max_tokens": int,
  "temperature": (int, float),
  "top_k": int,
  "top_p": (int, float),
  "min_p": (int, float),
  "seed": int,
  "budget": (int, float),
  "max_experts": int,
  "stop": (str, list),
}


def read_prompts(path: Path) -> list[tuple[str, str, dict]]:
  """Returns the prompts of a file: where it stands, its text, and what it sets for itself.

  Args:
    path: one prompt a line; or, where it ends in .jsonl, one object a line: "prompt", and if wanted any of the fields
      of `Request` that a user sets.

  Raises:
    UserError: names the line that can't be used.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts={path}: wanted a readable UTF-8 file ({error})") from None
  # Not `splitlines`, which cuts at form feeds too, and within JSON's strings.
  lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
  if not lines:
    raise UserError(f"--prompts={path}: wanted at least one prompt, a line each")
  if path.suffix == ".jsonl":
    return [(place, *_from_json(place, line)) for place, line in lines]
  return [(place, line, {}) for place, line in lines]


def _from_json(place: str, line: str) -> tuple[str, dict]:
  try:
    fields = parse(line)
  except ValueError as error:  # also of numbers that are too long
    raise UserError(f"{place}: not JSON ({error})") from None
  if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
    raise UserError(f'{place}: wanted an object with a text "prompt"')
  prompt = fields.pop("prompt")
  for name, value in fields.items():
    if name not in _FIELDS:
      raise UserError(f"{place}: unknown field {name!r}{did_you_mean(name, _FIELDS)}")
    if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
      raise UserError(f"{place}: {name} = {value!r}: wanted {'text or a list' if name == 'stop' else 'a number'}")
  if "stop" in fields:
    stop = fields["stop"]
    fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) for text in fields["stop"]):
      raise UserError(f"{place}: stop = {stop!r}: wanted text or a list of texts")
  return prompt, fields
