"""One step of training: gradients, update, controllers."""

import jax
import jax.numpy as jnp
import optax

from moe_lab.adapt.learning import join, split
from moe_lab.config.schema import Config, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.registry import make_router
from moe_lab.sharding.rules import copied, state_shardings
from moe_lab.train.losses import compute_loss
from moe_lab.train.metrics import Metrics, observed
from moe_lab.train.optimizer import learning_rate_schedule
from moe_lab.train.ppo import further_epochs, heads_or
from moe_lab.train.state import TrainState
from moe_lab.types import Batch

_NORM_STEPS = 50  # over which the usual norm of the gradient is taken; so many are seen before one can be a spike


def _is_good(grad_norm: jax.Array, state: TrainState, config: TrainConfig) -> jax.Array:
  """Returns whether a gradient is to be followed: a number, and no spike."""
  finite = jnp.isfinite(grad_norm)
  if not config.spike_factor:
    return finite
  return finite & ((state.step < _NORM_STEPS) | (grad_norm <= config.spike_factor * state.usual_norm))


def _averaged(usual: jax.Array, norm: jax.Array) -> jax.Array:
  return jnp.where(usual == 0, norm, usual + (norm - usual) / _NORM_STEPS)


def _gradients(learning, frozen, state: TrainState, batch: Batch, key, config: Config, model: Transformer, reference):
  """Mean gradient of the parameters that learn, and summed metrics, over `accumulate` micro-batches."""
  parts = config.train.accumulate
  before = None if reference is None else join(reference, frozen)

  def loss(learning, state, batch, key, config, model, earlier_ZE=0.0):
    return compute_loss(join(learning, frozen), state, batch, key, config, model, earlier_ZE, before)

  grad = jax.grad(loss, has_aux=True)
  if parts == 1:
    return grad(learning, state, batch, key, config, model)

  def one(total, inputs):
    part, part_key = inputs
    part = grad(learning, state, part, part_key, config, model, total[1].assigned_ZE)
    return jax.tree.map(jnp.add, total, part), None

  # Interleaved, so that each micro-batch is a fair sample of a sorted batch.
  micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
  shapes = jax.eval_shape(lambda: grad(learning, state, jax.tree.map(lambda x: x[0], micro), key, config, model))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (grads, metrics), _ = jax.lax.scan(one, zeros, (micro, jax.random.split(key, parts)))
  metrics = metrics._replace(losses=jax.tree.map(lambda x: x / parts, metrics.losses))
  return jax.tree.map(lambda g: g / parts, grads), metrics


def make_train_step(config: Config, model: Transformer, optimizer: optax.GradientTransformation):
  """Returns train_step(state, batch, reference=None) -> (state, Metrics), jitted; the state's buffers are donated.

  `reference`: where the router is held, the parameters that learn as they were before (`adapt/learning.py`); beside the
  frozen ones they are the model whose choice of experts is the measure.
  """
  schedule, router = learning_rate_schedule(config.train), make_router(config.routing)
  routing_rests = config.adapt.router == "frozen"

  def train_step(state: TrainState, batch: Batch, reference=None) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    learning, others = split(state.params, config.adapt)
    grads, metrics = _gradients(learning, others, state, batch, key, config, model, reference)
    grad_norm = optax.global_norm(grads)
    good = _is_good(grad_norm, state, config.train)

    if config.routing.freezes_model:
      frozen = state.step >= config.routing.warmup_steps
      grads = heads_or(grads, jax.tree.map(jnp.zeros_like, grads), frozen)

    def update(params, opt_state):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      router_state, budget_state = state.router_state, state.budget_state
      if not routing_rests:
        seen = observed(metrics)
        router_state = router.updated_state(router_state, seen)
        budget_state = router.updated_budget(budget_state, seen, state.step)
      new = optax.apply_updates(params, updates)
      if config.routing.freezes_model:
        new, opt_state = jax.lax.cond(
          frozen,
          lambda new, opt_state: further_epochs(new, others, opt_state, state, batch, key, config, model, optimizer),
          lambda new, opt_state: (new, opt_state),
          heads_or(new, params, frozen),
          opt_state,
        )
      return new, opt_state, router_state, budget_state

    def skip(params, opt_state):
      return params, opt_state, state.router_state, state.budget_state

    # A gradient that is not followed changes nothing but the counters. A branch, since a select between
    # old and new would keep XLA from updating in place: three times the time on CPU.
    learning, *rest = jax.lax.cond(good, update, skip, learning, state.opt_state)
    new = TrainState(
      state.step + 1,
      join(learning, others),
      *rest,
      skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
      usual_norm=jnp.where(good, _averaged(state.usual_norm, grad_norm), state.usual_norm),
    )
    metrics = metrics._replace(
      steps=jnp.ones(()),
      skipped=1.0 - good,
      grad_norm=grad_norm,
      price=router.price(state.router_state, state.budget_state),
      learning_rate=schedule(state.step),
    )
    if model.mesh is not None:  # or the update would be spread as the compiler likes it
      new = jax.lax.with_sharding_constraint(new, state_shardings(new, model.mesh))
    return new, copied(metrics, model.mesh)

  return jax.jit(train_step, donate_argnums=0)
