"""The forms of what is answered, for the schema at /openapi.json; the replies are plain dicts, and a test compares."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length"]


class Reply(BaseModel):
  model_config = ConfigDict(extra="forbid")


class Compute(Reply):
  """What was spent on the response's tokens."""

  budget: float = Field(description="Mean experts per token and layer that were asked for.")
  max_experts: int | None = Field(description="Most experts of a token that were asked for.")
  mean_experts: float | None = Field(description="Per token and layer; null where there is no token.")
  flops_per_token: float | None = Field(description="Of the response's tokens on average, reckoned.")
  experts: list[float] = Field(description="Of each token, mean over layers; of all choices, one after another.")
  tokens: list[int] = Field(description="How many of them each choice has.")


class Usage(Reply):
  prompt_tokens: int
  completion_tokens: int
  total_tokens: int


class CompletionLogProbs(Reply):
  """In nats, by token."""

  tokens: list[str]
  token_logprobs: list[float | None]
  top_logprobs: list[dict[str, float] | None] | None
  text_offset: list[int]


class CompletionChoice(Reply):
  index: int
  text: str
  logprobs: CompletionLogProbs | None
  finish_reason: Finish


class Completion(Reply):
  id: str
  object: Literal["text_completion"]
  created: int
  model: str
  choices: list[CompletionChoice]
  usage: Usage
  compute: Compute


class Likely(Reply):
  token: str
  logprob: float
  bytes: list[int] | None


class ChatLogProb(Likely):
  top_logprobs: list[Likely]


class ChatLogProbs(Reply):
  content: list[ChatLogProb]
  refusal: None


class Answer(Reply):
  role: Literal["assistant"]
  content: str
  refusal: None


class ChatChoice(Reply):
  index: int
  message: Answer
  logprobs: ChatLogProbs | None
  finish_reason: Finish


class ChatCompletion(Reply):
  id: str
  object: Literal["chat.completion"]
  created: int
  model: str
  choices: list[ChatChoice]
  usage: Usage
  compute: Compute


class ModelCompute(Reply):
  method: str
  budget: float
  budgets: Annotated[list[float], Field(min_length=2, max_length=2)]
  max_experts: Annotated[list[int], Field(min_length=2, max_length=2)]
  steady: bool


class ModelCard(Reply):
  id: str
  object: Literal["model"]
  created: int
  owned_by: str
  max_model_len: int
  compute: ModelCompute


class ModelList(Reply):
  object: Literal["list"]
  data: list[ModelCard]


class Health(Reply):
  status: Literal["ok"]


class ErrorDetail(Reply):
  message: str
  type: str
  param: str | None
  code: str | None


class Error(Reply):
  error: ErrorDetail
