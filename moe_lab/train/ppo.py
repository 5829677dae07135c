"""PPO for the count policy of a frozen model (arXiv 1707.06347; on a frozen model, Ada-K, arXiv 2410.10456).

After the warm-up, which trains the model with random counts, all parameters but
the policy's and the value head's stay as they are. A batch's rollout is then
used for several epochs: the first is an ordinary step with the value baseline,
where the ratio of new to old probability is one; in the others the same
decisions are replayed and the ratio is clipped. The hidden states that the
policy reads do not change, since neither the model nor the decisions do.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_lab.adapt.learning import HEADS, join
from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.ops.cross_entropy import head_losses
from moe_lab.routing.base import Decisions
from moe_lab.routing.learner import Rollouts, clipped_lesson
from moe_lab.train.losses import inputs_of
from moe_lab.train.state import TrainState
from moe_lab.types import Batch

EPOCHS = 4


def heads_or(params: Any, others: Any, frozen: jax.Array) -> Any:
  """Returns the heads' leaves of `params`, and of `others` all the rest where the model is frozen."""

  def one(path, mine, other):
    return mine if path[-1].key in HEADS else jnp.where(frozen, other, mine)

  return jax.tree_util.tree_map_with_path(one, params, others)


def _with_counts_of(opt_state: optax.OptState, old: optax.OptState) -> optax.OptState:
  """Returns `opt_state` with the step counters of `old`: epochs of one step share its learning rate."""

  def one(path, new, before):
    return before if getattr(path[-1], "name", "") == "count" else new

  return jax.tree_util.tree_map_with_path(one, opt_state, old)


def further_epochs(
  params,
  others,
  opt_state: optax.OptState,
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  config: Config,
  model: Transformer,
  optimizer: optax.GradientTransformation,
) -> tuple[Any, optax.OptState]:
  """Returns parameters and optimizer state after the epochs that follow the first.

  Args:
    params: that learn, after the first epoch.
    others: parameters that do not (`adapt/learning.py`).
    opt_state: the same.
    state: before it.
    batch: of the step.
    key: that the rollout's counts were drawn with.
    config: of the run.
    model: pure apply.
    optimizer: of the run.
  """
  inputs = inputs_of(batch, key, config)

  def run(params, decisions: Decisions):
    return model.apply(
      {"params": join(params, others)},
      inputs.token_BL,
      inputs.segment_BL,
      inputs.budget_B,
      state.router_state,
      key=key,  # so that noise, too, is that of the rollout
      decisions=decisions,
    )

  out = run(state.params, Decisions())
  old, decisions = out.stats.policy, Decisions(count_T=out.stats.count_T)
  nll_T = head_losses(out.hidden_BLD.reshape(inputs.token_BL.size, -1), out.head_VD, inputs.target_BL.reshape(-1))
  nll_BL = nll_T.reshape(inputs.token_BL.shape)
  rollouts = Rollouts(nll_BL, inputs.weight_BL, inputs.segment_BL, inputs.budget_B, num_twins=0)

  def loss(params):
    terms = run(params, decisions).stats.policy
    return clipped_lesson(terms, old, rollouts, state.budget_state, config.routing)

  def epoch(carry, _):
    params, opt_state = carry
    updates, new_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    new = heads_or(optax.apply_updates(params, updates), params, jnp.asarray(True))  # weight decay moves all
    return (new, _with_counts_of(new_state, opt_state)), None

  return jax.lax.scan(epoch, (params, opt_state), length=EPOCHS - 1)[0]
