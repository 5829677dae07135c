"""Controls: what would the same compute have bought without the policy's judgement?"""

from collections.abc import Callable

import numpy as np

from moe_lab.evaluate.perplexity import EvalStep
from moe_lab.routing.base import Decisions, RouterState
from moe_lab.types import Batch


def shuffled_counts(
  eval_step: EvalStep, params, router_state: RouterState, budget: float, seed: int
) -> Callable[[Batch], Decisions]:
  """Returns a `decide` for `perplexity.evaluate`: the policy's own counts, dealt out at random.

  Within a layer and a batch the real tokens swap their counts, so the histogram
  of every layer, and with it the compute, is exactly the policy's.
  """
  rng = np.random.default_rng(seed)

  def decide(batch: Batch) -> Decisions:
    count_ZT = np.array(eval_step(params, router_state, batch, budget).count_ZBL).reshape(-1, batch.tokens[:, 1:].size)
    real_T = batch.segments[:, :-1].reshape(-1) != 0
    for count_T in count_ZT:
      count_T[real_T] = rng.permutation(count_T[real_T])
    return Decisions(count_T=count_ZT)

  return decide


def fixed_count(num_layers: int, count: int) -> Callable[[Batch], Decisions]:
  """Returns a `decide` that gives every token `count` experts in each of `num_layers` mixture-of-experts layers."""
  return lambda batch: Decisions(count_T=np.full((num_layers, batch.tokens[:, 1:].size), count, np.int32))
