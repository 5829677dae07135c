"""Signs that routing has collapsed, read off an evaluation: each is a sentence for a person."""

from collections.abc import Sequence

DEAD = 0.01  # of the mean load: an expert below it does nothing
MANY_DEAD = 0.25  # of a layer's experts
ALIKE = 0.99  # share of tokens with one count, in every layer
OFF_BUDGET = 0.03  # relative


def dead_experts(load: Sequence[Sequence[float]]) -> list[int]:
  """Returns how many experts of each layer get less than 1% of the layer's mean load.

  Args:
    load: [Z][E], shares of a layer's rows.
  """
  return [sum(share * len(row) < DEAD for share in row) for row in load]


def max_over_mean_load(load: Sequence[Sequence[float]]) -> list[float]:
  """Returns the busiest expert's load of each layer over the layer's mean; 1 is even."""
  return [max(row) * len(row) for row in load]


def alarms(result: dict, budget: float, fixed_count: bool) -> list[str]:
  """Returns what is wrong with a model's routing; empty if nothing is.

  Args:
    result: of `perplexity.evaluate`.
    budget: mean experts asked for.
    fixed_count: every token is meant to get as many experts as every other.
  """
  found = []
  for layer, dead in enumerate(dead_experts(result["load"])):
    if dead > MANY_DEAD * len(result["load"][layer]):
      found.append(f"layer {layer}: {dead} of {len(result['load'][layer])} experts are dead")
  if not fixed_count and all(max(row) >= ALIKE for row in result["k_histogram"]):
    counts = sorted({row.index(max(row)) for row in result["k_histogram"]})
    found.append(f"nearly every token takes the same count ({', '.join(map(str, counts))})")
  if abs(result["mean_experts"] / budget - 1) > OFF_BUDGET:
    found.append(f"{result['mean_experts']:.2f} experts for a budget of {budget:.2f}")
  return found
