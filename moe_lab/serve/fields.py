"""The fields of a request: what each may be, and one line on the first that is not."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from moe_lab.data.chat import ROLES
from moe_lab.errors import did_you_mean
from moe_lab.serve import limits
from moe_lab.serve.refusals import Refusal, shown

MOST = 2**31 - 1  # of an integer on the device
UNKNOWN = "unknown_field"

# Lists stop at their first mistake: a body of a million of them must not make a million messages.
Ids = Annotated[list[Annotated[int, Field(ge=0, le=MOST)]], Field(fail_fast=True, min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]
Zero = Annotated[float, Field(ge=0, le=0)]
NoItems = Annotated[list[Any], Field(max_length=0)]

UNSUPPORTED = {
  "frequency_penalty": "0", "presence_penalty": "0", "logit_bias": "{}", "best_of": "1", "suffix": "no suffix",
  "tools": "no tools", "tool_choice": "'none'", "functions": "no functions", "function_call": "'none'",
  "response_format": "{'type': 'text'}", "modalities": "['text']", "audio": "null", "prediction": "null",
  "reasoning_effort": "null", "web_search_options": "null", "store": "false",
}  # fmt: skip


class Fields(BaseModel):
  """An object of a request's body. A field that is null is as one that is not there."""

  model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

  @model_validator(mode="before")
  @classmethod
  def _known(cls, value: Any) -> Any:
    if isinstance(value, dict):
      for name in value:
        if name not in cls.model_fields:
          near = did_you_mean(shown(name), cls.model_fields)
          raise PydanticCustomError(UNKNOWN, "{name}", {"name": shown(name)[1:-1], "near": near})
    return value


class ComputeFields(Fields):
  """How much may be spent on each token."""

  budget: float | None = Field(None, description="Mean experts per token and layer; by default the server's.")
  max_experts: int | None = Field(None, ge=1, le=MOST, description="No token takes more experts.")


class StreamOptions(Fields):
  include_usage: bool | None = Field(None, description="Whether a last chunk says how many tokens there were.")


class TextFormat(Fields):
  type: Literal["text"]


class GenerationFields(Fields):
  """What both ways of asking share. Those that can only be 0, empty or null are OpenAI's that this server lacks."""

  model: str = Field(description="As /v1/models names it.")
  max_tokens: int | None = Field(None, ge=0, le=MOST, description="At most so many new tokens.")
  temperature: float | None = Field(None, ge=0, le=2, description="1 by default; 0 takes the most likely token.")
  top_p: float | None = Field(None, ge=0, le=1, description="Draw from the likeliest tokens that reach this share.")
  top_k: int | None = Field(None, ge=0, le=MOST, description="Draw from so many likeliest tokens; 0: from all.")
  min_p: float | None = Field(None, ge=0, le=1, description="Draw from tokens at least so likely, over the likeliest.")
  n: int | None = Field(None, ge=1, le=limits.N, description="Responses for each prompt.")
  stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=limits.STOPS)] | None = Field(
    None, description=f"Text, or up to {limits.STOPS} texts, that end a response and are not part of it."
  )
  seed: int | None = Field(
    None, ge=-(2**63), le=2**63 - 1, description="The same seed, modulo 2^31, gives the same draws; by default random."
  )
  stream: bool | None = Field(None, description="Whether tokens are sent as they come, as server-sent events.")
  stream_options: StreamOptions | None = None
  compute: ComputeFields | None = None
  user: str | None = Field(None, description="Taken and not looked at.")
  frequency_penalty: Zero | None = None
  presence_penalty: Zero | None = None
  logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class CompletionFields(GenerationFields):
  """The body of /v1/completions."""

  prompt: (
    str
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.CHOICES)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=limits.CHOICES)]
  ) = Field(description=f"Text, token ids, or a list of up to {limits.CHOICES} of either.")
  logprobs: int | None = Field(
    None, ge=0, le=limits.COMPLETION_LOG_PROBS, description="Log-probabilities, beside so many likeliest tokens."
  )
  echo: bool | None = Field(None, description="Whether the prompt is part of the text, and of the log-probabilities.")
  best_of: Annotated[int, Field(ge=1, le=1)] | None = None
  suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(Fields):
  type: Literal["text"]
  text: str


class Message(Fields):
  """One message; an answer's other fields may come back as they were sent."""

  role: Literal[ROLES]
  content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=limits.MESSAGE_PARTS)] = Field(
    description=f"Text, or up to {limits.MESSAGE_PARTS} parts of the type text."
  )
  refusal: None = None
  annotations: NoItems | None = None
  audio: None = None
  function_call: None = None
  tool_calls: NoItems | None = None

  @property
  def text(self) -> str:
    return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatFields(GenerationFields):
  """The body of /v1/chat/completions."""

  messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=limits.MESSAGES)]
  max_completion_tokens: int | None = Field(
    None, ge=0, le=MOST, description="As max_tokens; of both, the smaller counts."
  )
  logprobs: bool | None = Field(None, description="Whether to give log-probabilities.")
  top_logprobs: int | None = Field(
    None,
    ge=0,
    le=limits.CHAT_LOG_PROBS,
    description="So many likeliest tokens beside each; from 1 on it asks for both.",
  )
  tools: NoItems | None = None
  tool_choice: Literal["none"] | None = None
  functions: NoItems | None = None
  function_call: Literal["none"] | None = None
  response_format: TextFormat | None = None
  modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
  audio: None = None
  prediction: None = None
  reasoning_effort: None = None
  web_search_options: None = None
  store: Literal[False] | None = None


_MODELS = (CompletionFields, ChatFields, Message, TextPart, ComputeFields, StreamOptions, TextFormat)
_DESCRIBED = {name: field.description for model in _MODELS for name, field in model.model_fields.items()}


def refusal_of(errors: Sequence[dict]) -> Refusal:
  """Returns the refusal of a body; `errors` are pydantic's."""
  first = errors[0]
  place = [part for part in first["loc"] if part != "body"]
  if first["type"] == "json_invalid":
    return Refusal(400, f"the body: wanted JSON ({first.get('ctx', {}).get('error', 'cut short')})")
  # Where a field may be of several types, what follows its name is a type's.
  path = list(itertools.takewhile(lambda part: isinstance(part, int) or part in _DESCRIBED, place))
  if first["type"] == UNKNOWN:
    name = ".".join(map(str, [*path, first["ctx"]["name"]]))
    return Refusal(400, f"{name}: no such field here{first['ctx']['near']}", param=name, code="unknown_field")
  if not path:
    return Refusal(400, "the body: wanted a JSON object, with the header Content-Type: application/json")
  name, wanted = ".".join(map(str, path)), first["msg"][:1].lower() + first["msg"][1:]
  if first["type"] == "missing":
    return Refusal(400, f"{name}: wanted it", param=name)
  got = shown(first["input"])
  if path[0] in UNSUPPORTED:
    wanted = f"not supported; wanted {UNSUPPORTED[path[0]]}, or nothing"
    return Refusal(400, f"{name} = {got}: {wanted}", param=path[0], code="unsupported_field")
  if len(path) < len(place) and (told := _DESCRIBED.get(path[-1])):
    wanted = "wanted " + told[:1].lower() + told[1:].rstrip(".")
  return Refusal(400, f"{name} = {got}: {wanted}", param=name)
