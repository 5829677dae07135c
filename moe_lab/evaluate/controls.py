"""Controls: what would the same compute have bought without the policy's judgement, or with a perfect one?

Each function returns a `decide` for `perplexity.evaluate`: the counts that
every token of a batch is given instead of the router's own.
"""

from collections.abc import Callable, Iterable, Sequence

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


def _own_counts(eval_step: EvalStep, params, router_state: RouterState, batch: Batch, budget: float):
  """Returns count_ZT of the router's own rule, and which tokens are real."""
  count_ZBL = np.asarray(eval_step(params, router_state, batch, budget).count_ZBL)
  return count_ZBL.reshape(count_ZBL.shape[0], -1), batch.segments[:, :-1].reshape(-1) != 0


def _dithered(mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns whole counts whose expectation is `mean`."""
  return np.floor(mean + rng.random(mean.shape)).astype(np.int32)


def mean_count(num_layers: int, mean: float, seed: int) -> Callable[[Batch], Decisions]:
  """Returns a `decide` that gives every token `mean` experts, by chance one of the two whole numbers around it."""
  rng = np.random.default_rng(seed)
  return lambda batch: Decisions(count_T=_dithered(np.full((num_layers, batch.tokens[:, 1:].size), mean), rng))


def counts_by_layer(
  eval_step: EvalStep, params, router_state: RouterState, budget: float, reference: Iterable[Batch], seed: int
) -> Callable[[Batch], Decisions]:
  """The policy's mean count of each layer, for every token alike: does it know more than which layers pay?

  Means come from `reference`, another split than the one that is evaluated.
  A mean that is no whole number is dealt out at random between its neighbours.
  """
  total, tokens, rng = 0.0, 0, np.random.default_rng(seed)
  for batch in reference:
    count_ZT, real_T = _own_counts(eval_step, params, router_state, batch, budget)
    total, tokens = total + count_ZT[:, real_T].sum(1), tokens + real_T.sum()
  mean_Z1 = (total / tokens)[:, None]
  return lambda batch: Decisions(count_T=_dithered(mean_Z1.repeat(batch.tokens[:, 1:].size, axis=1), rng))


def counts_by_token(
  eval_step: EvalStep,
  params,
  router_state: RouterState,
  budget: float,
  reference: Iterable[Batch],
  vocab_size: int,
  seed: int,
) -> Callable[[Batch], Decisions]:
  """The policy's mean count of each layer and token id: does it know more than which tokens pay?

  As `counts_by_layer`; an id that `reference` does not have gets the layer's mean.
  """
  total_ZV, tokens_V, rng = 0.0, np.zeros(vocab_size), np.random.default_rng(seed)
  for batch in reference:
    count_ZT, real_T = _own_counts(eval_step, params, router_state, batch, budget)
    token_T = batch.tokens[:, :-1].reshape(-1)[real_T]
    total_ZV = total_ZV + np.stack([np.bincount(token_T, c[real_T], vocab_size) for c in count_ZT])
    tokens_V += np.bincount(token_T, minlength=vocab_size)
  layer_Z1 = total_ZV.sum(1, keepdims=True) / tokens_V.sum()
  mean_ZV = np.where(tokens_V > 0, total_ZV / np.maximum(tokens_V, 1), layer_Z1)
  return lambda batch: Decisions(count_T=_dithered(mean_ZV[:, batch.tokens[:, :-1].reshape(-1)], rng))


def cheapest_for_budget(nll_AT: np.ndarray, counts: Sequence[int], budget: float) -> np.ndarray:
  """Returns count_T: for each token one of `counts`, so that the losses' sum is least at a mean count of `budget`.

  A Lagrangian pick, argmin_a nll + price * count, with the price found by
  bisection; it may be negative, so that the budget is spent. Between the two
  picks that the last prices give, tokens change sides in order until the budget
  is met, to within one token.

  Args:
    nll_AT: loss of each token with each count for all tokens, nats.
    counts: ascending.
    budget: mean experts, between the first and the last of `counts`.
  """
  counts_A = np.asarray(counts)

  def pick(price):
    return counts_A[np.argmin(nll_AT + price * counts_A[:, None], axis=0)]

  span = np.ptp(nll_AT) + 1.0
  low, high = -span, span  # at these prices all tokens take the most, the fewest
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (low, middle) if pick(middle).mean() <= budget else (middle, high)
  count_T, more_T = pick(high).copy(), pick(low)
  for t in np.flatnonzero(more_T != count_T):
    if count_T.sum() + more_T[t] - count_T[t] > budget * count_T.size:
      break
    count_T[t] = more_T[t]
  return count_T


def oracle_counts(
  eval_step: EvalStep,
  params,
  router_state: RouterState,
  budget: float,
  counts: Sequence[int],
) -> Callable[[Batch], Decisions]:
  """Each token gets, in all layers, the count that serves its own loss best under the budget: an upper bound.

  Its loss with each of `counts` fixed for the whole batch is looked up, the
  target included, so no router can do it. It is not exact: a token's count
  changes what later tokens attend to, so the loss is that of the replay.
  """
  counts = sorted(counts)

  def decide(batch: Batch) -> Decisions:
    num_layers = router_state.bias_E.shape[0]
    real_T, nll_AT = batch.segments[:, :-1].reshape(-1) != 0, []
    for count in counts:
      result = eval_step(params, router_state, batch, budget, fixed_count(num_layers, count)(batch))
      # A token that predicts nothing counted gains nothing either.
      nll_AT.append((np.asarray(result.nll_BL) * np.asarray(result.weight_BL)).reshape(-1)[real_T])
    count_T = np.zeros(real_T.size, np.int32)
    count_T[real_T] = cheapest_for_budget(np.stack(nll_AT), counts, budget)
    return Decisions(count_T=np.tile(count_T, (num_layers, 1)))

  return decide
