"""What requests cost: experts and FLOPs of each token that had to be computed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_lab.config.schema import Config
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.nn.attention import layer_windows


@dataclasses.dataclass(frozen=True)
class Compute:
  """What some tokens cost; sums, so that costs add.

  A token belongs to the answer if its output predicts a token of the answer: the last one of the question does.

  Attributes:
    prompt_tokens, answer_tokens: tokens computed.
    prompt_experts, answer_experts: experts that they took, mean over layers, summed over tokens.
    flops: of all of them.
  """

  prompt_tokens: int = 0
  prompt_experts: float = 0.0
  answer_tokens: int = 0
  answer_experts: float = 0.0
  flops: float = 0.0

  def __add__(self, other: "Compute") -> "Compute":
    return Compute(
      *(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
    )

  def report(self) -> dict[str, float | int | None]:
    """Returns tokens, FLOPs per token, and mean experts: of all tokens, of prompts and of answers; None without any."""
    tokens = self.prompt_tokens + self.answer_tokens

    def mean(total: float, number: int) -> float | None:
      return total / number if number else None

    return {
      "tokens": tokens,
      "mean_experts": mean(self.prompt_experts + self.answer_experts, tokens),
      "prompt_experts": mean(self.prompt_experts, self.prompt_tokens),
      "answer_experts": mean(self.answer_experts, self.answer_tokens),
      "flops_per_token": mean(self.flops, tokens),
    }


class Meter:
  """Counts what sequences of a model cost, by the shapes of `forward_flops_per_token`.

  Three things are counted as they are, and not on average: the keys in each KV group's window, the experts, and the
  head, which only a token needs whose output is looked at.
  """

  def __init__(self, config: Config, longest: int):
    """Args: config: of the model; longest: tokens of a sequence."""
    nothing = forward_flops_per_token(config, 0, 0)
    self._head = nothing["head"]
    self._token = nothing["total"] - self._head
    self._expert = forward_flops_per_token(config, 1, 0)["experts"] - nothing["experts"]
    self._key = forward_flops_per_token(config, 0, 1)["attention_scores"]
    position = np.arange(1, longest + 1)
    keys = [position if window is None else np.minimum(position, window) for window in layer_windows(config.model)]
    self._keys_before = np.concatenate([[0.0], np.cumsum(np.mean(keys, axis=0))])

  def count(self, experts: Sequence[float], prompt_tokens: int) -> Compute:
    """Returns the cost of a sequence.

    Args:
      experts: of each token computed, from the first, mean over layers.
      prompt_tokens: of these, from the first, that predict nothing that is asked.
    """
    experts = np.nan_to_num(np.asarray(experts, np.float64))  # a dense model has no layer to take the mean over
    answer_tokens = len(experts) - prompt_tokens
    flops = (
      len(experts) * self._token
      + experts.sum() * self._expert
      + self._keys_before[len(experts)] * self._key
      + answer_tokens * self._head
    )
    prompt_experts = float(experts[:prompt_tokens].sum())
    return Compute(prompt_tokens, prompt_experts, answer_tokens, float(experts.sum()) - prompt_experts, float(flops))
