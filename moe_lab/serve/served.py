"""The model as the server sees it: its name, what may be asked of it, its tokens as text, and its FLOPs."""

import secrets
from collections.abc import Sequence

from moe_lab.config.schema import Config
from moe_lab.data.chat import TURN, Conversation, Part, ids_and_counted, ids_of, templated
from moe_lab.data.tokenizer import Tokenizer
from moe_lab.errors import UserError, did_you_mean
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from moe_lab.serve.fields import GenerationFields, Message
from moe_lab.serve.refusals import Refusal, shown


class ServedModel:
  """What the handlers know of the model.

  Attributes:
    name: as clients call it.
    capacity: most tokens of a sequence, prompt and response.
    budget: mean experts where a request asks for none.
    tokenizer: of the model.
  """

  def __init__(self, name: str, config: Config, tokenizer: Tokenizer, engine: Engine):
    """Args: engine: that serves it; only what does not change is read of it, since another thread owns it."""
    self.name, self.tokenizer, self.capacity, self.budget = name, tokenizer, engine.capacity, engine.budget
    self._config, self._check, self._steady = config, engine.check, engine.steady
    self._longest = int(max(tokenizer.bytes_per_token()))
    # FLOPs are linear in experts and context.
    none, experts, context = (forward_flops_per_token(config, *of)["total"] for of in ((0, 0), (1, 0), (0, 1)))
    self._flops = none, experts - none, context - none

  @property
  def card(self) -> dict:
    """What /v1/models says."""
    routing = self._config.routing
    return {
      "id": self.name,
      "object": "model",
      "created": 0,
      "owned_by": "moe_lab",
      "max_model_len": self.capacity,
      "compute": {
        "method": routing.method,
        "budget": self.budget,
        "budgets": list(routing.budgets),
        "max_experts": [max(routing.k_min, 1), routing.slots],
        "steady": self._steady,
      },
    }

  def check_name(self, name: str) -> None:
    """Refuses another model's name."""
    if name != self.name:
      wanted = f"wanted {shown(self.name)}{did_you_mean(name, [self.name])}"
      raise Refusal(404, f"model = {shown(name)}: not served here; {wanted}", param="model", code="model_not_found")

  def ids_of_text(self, text: str) -> list[int]:
    """Returns a prompt's ids, the one that begins a text first."""
    self._check_text(text, "prompt")
    return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]

  def ids_of_messages(self, messages: Sequence[Message]) -> list[int]:
    """Returns a conversation's ids up to where the assistant's answer begins."""
    self._check_text("".join(message.text for message in messages), "messages")
    parts = templated([{"role": message.role, "content": message.text} for message in messages])
    conversation = Conversation("", (*parts, Part(TURN.format(role="assistant"), False)))
    return ids_and_counted(ids_of(conversation, self.tokenizer))[0].tolist()

  def _check_text(self, text: str, param: str) -> None:
    """Refuses what can't fit before a tokenizer takes its time over it, and what is no text."""
    try:
      size = len(text.encode())
    except UnicodeEncodeError as error:
      wanted = f"wanted text in UTF-8, but character {error.start + 1} is none"
      raise Refusal(400, f"{param}: {wanted}", param=param) from None
    if size > self.capacity * self._longest:
      raise self.too_long(param, f"{len(text):,} characters")

  def too_long(self, param: str, has: str) -> Refusal:
    """Returns the refusal of a prompt that leaves no room; `has`: how long it is, in words."""
    wanted = f"wanted at most {self.capacity - 1} tokens, since prompt and response share {self.capacity}"
    return Refusal(400, f"{param}: it has {has}; {wanted}", param=param, code="context_length_exceeded")

  def requests(
    self, fields: GenerationFields, prompts: Sequence[list[int]], param: str, max_tokens: int | None, **more
  ) -> list[Request]:
    """Returns what the engine is asked for: n responses to each prompt.

    Args:
      fields: of the body.
      prompts: ids.
      param: the field that the prompts came from.
      max_tokens: new tokens; None: as many as there is room for. Where it is 0, one is asked for and not told.
      **more: fields of the engine's requests.

    Raises:
      Refusal: the engine could not serve them.
    """
    compute = fields.compute
    stop = fields.stop or []
    # The engine has 31 bits of it, clients 64 and a sign.
    seed = secrets.randbits(31) if fields.seed is None else fields.seed % 2**31
    requests = []
    for prompt in prompts:
      room = self.capacity - len(prompt)
      if room < 1:
        raise self.too_long(param, f"{len(prompt):,} tokens")
      if max_tokens is not None and max_tokens > room:
        wanted = f"wanted at most {room} with a prompt of {len(prompt)} tokens, since both share {self.capacity}"
        raise Refusal(400, f"max_tokens = {max_tokens}: {wanted}", param="max_tokens", code="context_length_exceeded")
      for index in range(fields.n or 1):
        request = Request(
          prompt,
          max_tokens=max(room if max_tokens is None else max_tokens, 1),
          temperature=1.0 if fields.temperature is None else fields.temperature,
          top_k=fields.top_k or 0,
          top_p=1.0 if fields.top_p is None else fields.top_p,
          min_p=fields.min_p or 0.0,
          seed=(seed + index) % 2**31,
          budget=compute and compute.budget,
          max_experts=compute and compute.max_experts,
          stop=(stop,) if isinstance(stop, str) else tuple(stop),
          stop_token=self.tokenizer.eos_id,
          **more,
        )
        try:
          self._check(request)
        except UserError as error:
          raise _refusal_of(error, param) from None
        requests.append(request)
    return requests

  def piece(self, token: int) -> str:
    """Returns a token as a reply spells it: its text; bytes that are no whole characters as bytes:\\xNN."""
    data = self.tokenizer.token_bytes(token)
    try:
      return data.decode()
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

  def flops_per_token(self, mean_experts: float, mean_context: float) -> float:
    """Returns the FLOPs of a token: `mean_experts` experts in each layer, `mean_context` tokens to look back on."""
    none, experts, context = self._flops
    return none + experts * mean_experts + context * mean_context


def _refusal_of(error: UserError, prompt: str) -> Refusal:
  """Returns the engine's line as a refusal that names the body's field; `prompt`: the one that the prompt came from."""
  line = str(error)
  name = line.split("=")[0].split(":")[0]
  param = {"prompt": prompt, "budget": "compute.budget", "max_experts": "compute.max_experts"}.get(name, name)
  return Refusal(400, param + line[len(name) :], param=param)
