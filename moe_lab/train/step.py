"""One step of training: gradients, update, controllers."""

import jax
import jax.numpy as jnp
import optax

from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.routing import balance
from moe_lab.routing import budget as budget_control
from moe_lab.routing.base import RouterState
from moe_lab.routing.budget import BudgetState
from moe_lab.routing.count_policy import calibrated_shift
from moe_lab.train.losses import compute_loss
from moe_lab.train.metrics import Metrics
from moe_lab.train.optimizer import learning_rate_schedule
from moe_lab.train.state import TrainState
from moe_lab.types import Batch


def _gradients(state: TrainState, batch: Batch, key, config: Config, model: Transformer):
  """Mean gradient and summed metrics over `accumulate` micro-batches."""
  parts = config.train.accumulate
  grad = jax.grad(compute_loss, has_aux=True)
  if parts == 1:
    return grad(state.params, state, batch, key, config, model)

  def one(total, inputs):
    part, part_key = inputs
    return jax.tree.map(jnp.add, total, grad(state.params, state, part, part_key, config, model)), None

  # Interleaved, so that each micro-batch is a fair sample of a sorted batch.
  split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
  shapes = jax.eval_shape(lambda: grad(state.params, state, jax.tree.map(lambda x: x[0], split), key, config, model))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (grads, metrics), _ = jax.lax.scan(one, zeros, (split, jax.random.split(key, parts)))
  metrics = metrics._replace(losses=jax.tree.map(lambda x: x / parts, metrics.losses))
  return jax.tree.map(lambda g: g / parts, grads), metrics


def _updated_router(state: TrainState, metrics: Metrics, config: Config) -> tuple[RouterState, BudgetState]:
  """Balance, greedy calibration and budget control after a step."""
  router, routing = state.router_state, config.routing
  count_mean_Z = metrics.count_mean_Z()
  shift_Z = router.count_shift
  budget_state = state.budget_state
  if routing.method == "dynamic":
    shift_Z = calibrated_shift(shift_Z, count_mean_Z, metrics.greedy_mean_Z(), routing)
    mean_square = metrics.advantage_square / jnp.maximum(metrics.advantage_count, 1)
    scale = budget_control.updated_scale(budget_state.scale, mean_square)
    moved = budget_control.updated(budget_state, routing, count_mean_Z.mean(), scale)
    # In the warm-up no price could move the counts; integrating then would wind the controller up.
    learning = state.step >= routing.warmup_steps
    budget_state = jax.tree.map(
      lambda new, old: jnp.where(learning, new, old), moved, budget_state._replace(scale=scale)
    )
  bias_ZE = router.bias_E
  if routing.bias_update_rate > 0:
    bias_ZE = balance.updated_bias(bias_ZE, metrics.assigned_ZE, routing.bias_update_rate)
  return RouterState(bias_ZE, balance.updated_load(router.load_E, metrics.assigned_ZE), shift_Z), budget_state


def make_train_step(config: Config, model: Transformer, optimizer: optax.GradientTransformation):
  """Returns train_step(state, batch) -> (state, Metrics), jitted; the state's buffers are donated."""
  schedule = learning_rate_schedule(config.train)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    grads, metrics = _gradients(state, batch, key, config, model)
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(grad_norm)

    def update(params, opt_state):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      router_state, budget_state = _updated_router(state, metrics, config)
      return optax.apply_updates(params, updates), opt_state, router_state, budget_state

    def skip(params, opt_state):
      return params, opt_state, state.router_state, state.budget_state

    # A gradient that is not finite changes nothing but the counters. A branch, since a select between
    # old and new would keep XLA from updating in place: three times the time on CPU.
    new = TrainState(
      state.step + 1,
      *jax.lax.cond(finite, update, skip, state.params, state.opt_state),
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = metrics._replace(
      steps=jnp.ones(()),
      skipped=1.0 - finite,
      grad_norm=grad_norm,
      price=budget_control.price(state.budget_state, config.routing),
      learning_rate=schedule(state.step),
    )
    return new, metrics

  return jax.jit(train_step, donate_argnums=0)
