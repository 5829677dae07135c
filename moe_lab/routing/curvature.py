"""The count policy by values: what each further expert is worth to a token, learnt from the loss's curvature.

To leave out an expert is to scale its gate by m = 0 instead of 1. To second
order the loss then rises by half its curvature in m, and where the model is
calibrated the expected curvature is the expected squared slope: Fisher pruning's
criterion (arXiv 1801.05787), here for one token's expert and not for a weight.
The slope of every gate is in the backward pass that training runs anyway. It
takes in what the expert does to later tokens too, costs no second rollout, and
needs no baseline: an unpredictable token moves the loss, but the experts
hardly move its prediction, so its slopes are small.

The slope in m is the gate times the loss's slope in the expert's output (and, where gates have a length in common, what
the others gain by its leaving), so the value is the gate's square, which the router gives at no cost, times what a head
regresses from the hidden state and the fall of the gates. The policy goes on to
the next expert with a probability that rises with value over price, one price
for all layers: nats are nats wherever they are spent. Controllers move the price until
the mean count holds the budget. That is value-based learning of a
contextual bandit, next to the policy gradients of `learner.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import ModelConfig
from moe_lab.routing.base import Assignment, Observed, PolicyTerms, RouterContext, RouterState, RouterStats
from moe_lab.routing.budget import BudgetState
from moe_lab.routing.budget_table import at, knots, table_shape, targets
from moe_lab.routing.dynamic import head, policy_features
from moe_lab.routing.router import Router, per_token
from moe_lab.routing.selection import SAME_LENGTH, TINY, assign, replayed, take

HEAD_WIDTH = 8  # hidden units: 16 and 32 cost more and did no better (experiments/routing_study/LOG.md)
START = -7.0  # log of the value before learning, in nats: what an expert is worth to a token in a small model
# The policy's sharpness is how fast its choice turns with log value: nothing in the warm-up, then growing by so much in
# each time as long (and never faster than the controllers follow), up to a bound at which what is trained is all but
# what inference does.
SHARPENING, SHARPEST, LEAST_STEPS = 4.0, 16.0, 100
RATE = 0.3  # of the price controllers, per step and relative error: 0.1 lagged 9% behind while the policy sharpened
LEVEL_DECAY = 0.9  # of the mean log value, a step: batches differ, and the last one's mean is not inference's
THRESHOLD_DECAY = 0.95  # of what inference goes by, a step
LEAST_REST = 0.01  # of the squared gates, which the others are taken to have at least where one is left out
RATIO_BOUND = 20.0  # of observed over predicted value: squares of slopes have heavy tails


@jax.custom_vjp
def observe_value(
  gate_TK: jax.Array, growth_TK: jax.Array, log_value_TK: jax.Array, last_TK: jax.Array, tokens: jax.Array
) -> jax.Array:
  """Returns the gates unchanged; in the backward pass their slopes become the targets of `log_value_TK`.

  The slopes exist only there, so that is where the head's gradient is made: of the mean over observed slots
  of log v + target / v, the negative log-likelihood of a squared normal slope of variance 2 v, whose minimum is
  v = E[target], whatever its scale. The gates' own gradient passes through.

  Args:
    gate_TK: float32, of the experts that run.
    growth_TK: float32, by how many times a token's other gates grow where this expert is left out.
    log_value_TK: float32, the head's prediction, in log nats.
    last_TK: float32, 1 for each token's last expert, the one that the decision was about; others are not observed.
    tokens: [], whose mean loss it is that has a gradient here.
  """
  return gate_TK


def _observe_backward(saved, d_gate_TK):
  gate_TK, growth_TK, log_value_TK, last_TK, tokens = saved
  part_TK = d_gate_TK * gate_TK
  others_TK = part_TK.sum(1, keepdims=True) - part_TK
  slope_TK = ((growth_TK - 1) * others_TK - part_TK) * tokens
  target_TK = 0.5 * jnp.square(slope_TK)
  ratio_TK = jnp.minimum(target_TK * jnp.exp(-log_value_TK), RATIO_BOUND)
  d_log_value_TK = last_TK * (1 - ratio_TK) / jnp.maximum(last_TK.sum(), 1)
  return d_gate_TK, None, d_log_value_TK, None, None


observe_value.defvjp(lambda *inputs: (inputs[0], inputs), _observe_backward)


def even_odds(budget: np.ndarray, k_min: int, k_max: int) -> np.ndarray:
  """Returns the log-odds of going on at which the mean count is `budget`, if they are the same at every count."""
  odds = np.linspace(-12, 12, 4801)
  going_on = 1 / (1 + np.exp(-odds))
  mean = k_min + sum(going_on**step for step in range(1, k_max - k_min + 1))
  return np.interp(budget, mean, odds).astype(np.float32)


class CurvatureValued(Router):
  """The `dynamic` method with `routing.learner = curvature`."""

  def parameters(self, model: ModelConfig):
    features, steps = model.dim + 1, self.config.k_max - self.config.k_min
    if self.config.policy_input == "hidden":
      features += self.config.k_max
    return super().parameters(model) | {
      "policy_in": ((features, HEAD_WIDTH), features**-0.5),
      "policy_bias": ((HEAD_WIDTH,), 0.0),
      "policy_out": ((HEAD_WIDTH, steps), 0.0),
    }

  def __call__(self, parameters, x_TD: jax.Array, context: RouterContext) -> tuple[Assignment, RouterStats]:
    k_min, k_max, state = self.config.k_min, self.config.k_max, context.state.method
    logits_TE = self.logits(parameters, x_TD)
    expert_TK = self.ranked(logits_TE, context)
    above_TS = self._log_values(parameters, x_TD, logits_TE, expert_TK, context)
    known_TS = jax.lax.stop_gradient(above_TS)

    def first_stop(goes_on_TS):
      # A budget of k_min leaves nothing to decide; a price read between the knots of a table would not be high enough.
      goes_on_TS &= context.budget_T[:, None] > k_min
      return k_min + jnp.cumprod(goes_on_TS.astype(jnp.int32), axis=1).sum(1)

    price, threshold, odds = (
      at(state[name], context.budget_T, self.config).reshape(-1, 1) for name in ("price", "threshold", "odds")
    )
    if context.key is None:
      greedy_T = count_T = first_stop(known_TS > threshold)
    else:
      greedy_T = first_stop(
        self._without_dropout(parameters, x_TD, logits_TE, known_TS, context) > state["level"] + price
      )
    going_on_TS = jax.nn.sigmoid(self._sharpness(state["steps"]) * (known_TS - state["level"]) + odds)
    if context.key is not None:
      count_T = first_stop(jax.random.uniform(jax.random.fold_in(context.key, 0), going_on_TS.shape) < going_on_TS)
    count_T = replayed(count_T, context)

    assignment = assign(logits_TE, expert_TK, count_T, context.mask_T, self.config.slot_gate)
    slot_K = jnp.arange(k_max)
    last_TK = (slot_K == count_T[:, None] - 1) & (slot_K >= k_min) & context.mask_T[:, None]
    log_value_TK = jnp.pad(START + above_TS, ((0, 0), (k_min, 0)))
    tokens = jnp.maximum(context.mask_T.sum(), 1).astype(jnp.float32)
    gate_TK = observe_value(
      assignment.gate_TK, self._growth(assignment.gate_TK), log_value_TK, last_TK.astype(jnp.float32), tokens
    )

    policy = self._terms(going_on_TS, count_T, greedy_T)
    sums = {"log_value": context.mask_T.astype(jnp.float32) @ known_TS.mean(1)}
    return assignment._replace(gate_TK=gate_TK), self.stats(logits_TE, assignment, context, policy, sums)

  def _log_values(self, parameters, x_TD, logits_TE, expert_TK, context: RouterContext) -> jax.Array:
    """Returns what each of the S = k_max - k_min experts beyond the first k_min is worth: log over START, [T, S]."""
    features = policy_features(x_TD, context, self.config)
    if self.config.policy_input == "token":  # a control, which shall not see the gates either
      return head(parameters, "policy", features)
    # Of the softmax over all experts, over a fair share.
    log_gate_TK = take(jax.nn.log_softmax(logits_TE, axis=-1), expert_TK) + np.log(logits_TE.shape[1])
    log_gate_TK = jax.lax.stop_gradient(log_gate_TK)
    features = jnp.concatenate([features, log_gate_TK], axis=1)
    if self.config.slot_gate in SAME_LENGTH:  # an expert's gate if it is the last, which is when it is asked about
      log_gate_TK = log_gate_TK - 0.5 * jnp.log(jnp.cumsum(jnp.exp(2 * log_gate_TK), axis=1))
    return head(parameters, "policy", features) + 2 * log_gate_TK[:, self.config.k_min :]

  def _growth(self, gate_TK: jax.Array) -> jax.Array:
    """Returns by how many times a token's other gates grow where an expert is left out: see `observe_value`."""
    if self.config.slot_gate not in SAME_LENGTH:
      return jnp.ones_like(gate_TK)
    square_TK = jnp.square(jax.lax.stop_gradient(gate_TK))
    share_TK = square_TK / jnp.maximum(square_TK.sum(1, keepdims=True), TINY)
    return jax.lax.rsqrt(jnp.maximum(1 - share_TK, LEAST_REST))

  def _without_dropout(self, parameters, x_TD, logits_TE, known_TS, context: RouterContext) -> jax.Array:
    """Returns the log values of the experts that inference would take, where none is dropped.

    The price has to hold the budget there: the best of all experts are worth more than the best of those left.
    """
    if self.config.expert_dropout == 0:
      return known_TS
    whole = context._replace(key=None)
    return jax.lax.stop_gradient(self._log_values(parameters, x_TD, logits_TE, self.ranked(logits_TE, whole), whole))

  def _sharpness(self, steps: jax.Array) -> jax.Array:
    warmup = self.config.warmup_steps
    return jnp.clip(SHARPENING * (steps - warmup) / max(warmup, LEAST_STEPS), 0, SHARPEST)

  def _terms(self, going_on_TS, count_T, greedy_T) -> PolicyTerms:
    """What is reported of the policy."""
    reached_TA = jnp.pad(jnp.cumprod(going_on_TS, axis=1), ((0, 0), (1, 0)), constant_values=1.0)
    prob_TA = reached_TA - jnp.pad(reached_TA[:, 1:], ((0, 0), (0, 1)))
    log_prob_TA = jnp.log(jnp.maximum(prob_TA, 1e-30))
    taken_T = jnp.clip(count_T - self.config.k_min, 0, prob_TA.shape[1] - 1)
    return PolicyTerms(
      log_prob_T=jnp.take_along_axis(log_prob_TA, taken_T[:, None], axis=1)[:, 0],
      expected_count_T=self.config.k_min - 1 + reached_TA.sum(1),
      entropy_T=-(prob_TA * log_prob_TA).sum(1),
      greedy_count_T=greedy_T.astype(jnp.float32),
      value_T=None,
    )

  def method_state(self, num_layers: int, num_experts: int) -> dict[str, jax.Array]:
    shape = (num_layers, *table_shape(self.config))
    odds = even_odds(knots(self.config), self.config.k_min, self.config.k_max)
    # "level" is the mean log value over START. Prices are over that, since it drifts as the model learns: a controller
    # that had to follow would lag behind. "threshold" is a running mean of their sum: a step's own goes up and down
    # with its batch, and inference by the last one missed the budget by up to 6%. Layers share all.
    return {
      "level": jnp.zeros(num_layers),
      "price": jnp.zeros(shape),
      "threshold": jnp.zeros(shape),
      "odds": jnp.broadcast_to(jnp.asarray(odds), shape) + 0.0,
      "steps": jnp.zeros(num_layers),
    }

  def updated_method_state(self, state: RouterState, seen: Observed) -> dict[str, jax.Array]:
    old = state.method

    def error(mean_Z):  # over all layers: one price
      return jnp.where(seen.asked > 0, mean_Z.mean(0) / targets(self.config) - 1, 0.0)

    now = per_token(seen.sums["log_value"], seen.token_count).mean()
    level = LEVEL_DECAY * old["level"] + (1 - LEVEL_DECAY) * now
    price = old["price"] + RATE * error(seen.greedy_mean)
    # Odds move with the sharpness, but also while there is little of it.
    sharpness = jnp.maximum(self._sharpness(old["steps"]), SHARPENING).reshape(-1, *(1,) * (price.ndim - 1))
    odds = old["odds"] - sharpness * RATE * error(seen.count_mean)
    if self.config.budget_mode == "at_most":
      least = float(np.log(max(self.config.lambda_min, 1e-12))) - START - level.reshape(sharpness.shape)
      price, odds = jnp.maximum(price, least), jnp.minimum(odds, -sharpness * least)
    now = level.reshape(sharpness.shape) + price
    threshold = THRESHOLD_DECAY * old["threshold"] + (1 - THRESHOLD_DECAY) * now
    return {"level": level, "price": price, "threshold": threshold, "odds": odds, "steps": old["steps"] + 1}

  def price(self, state: RouterState, budget_state: BudgetState) -> jax.Array:
    threshold = state.method["threshold"][0]  # the layers' are the same
    return jnp.exp(START + at(threshold, jnp.full(1, self.config.budget), self.config).mean())
