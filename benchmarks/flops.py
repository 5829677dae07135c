"""FLOPs of a run of each benchmark: `evaluate/flops.py`'s count, the same for both sides."""

from benchmarks.case import NEW, PROMPT, Case
from moe_lab.evaluate.flops import forward_flops_per_token


def _training(case: Case, mean_experts: float) -> dict[str, float]:
  """By component, per token: forward, and two products of the same size for each in the backward pass."""
  forward = forward_flops_per_token(case.config(), mean_experts, (case.seq_len + 1) / 2)
  return {component: 3 * flops for component, flops in forward.items()}


def train_step(case: Case, mean_experts: float, tokens: float) -> float:
  """Returns the FLOPs of a step that rolls out `tokens`."""
  return _training(case, mean_experts)["total"] * tokens


def moe_layer(case: Case, mean_experts: float) -> float:
  """Returns those of one layer's experts, forward and backward; the router's are not counted."""
  return _training(case, mean_experts)["experts"] / case.num_layers * case.batch_size * case.seq_len


def attention(case: Case) -> float:
  """Returns those of one layer's causal scores and sums, forward and backward."""
  return _training(case, case.k)["attention_scores"] / case.num_layers * case.batch_size * case.seq_len


def decode(case: Case, mean_experts: float) -> float:
  """Returns those of reading the prompts and generating."""
  return forward_flops_per_token(case.config(), mean_experts, PROMPT / 2)["total"] * (PROMPT + NEW) * case.sequences
