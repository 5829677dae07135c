"""AdamW with warm-up and decay; the count policy is clipped apart from the model."""

import jax
import jax.numpy as jnp
import optax

from moe_lab.config.schema import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, then the decay to the last step."""
  peak, final = config.learning_rate, config.learning_rate * config.final_lr_share
  rest = max(config.steps - config.warmup_steps, 1)
  decay = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_share),
    "linear": lambda: optax.linear_schedule(peak, final, rest),
    "constant": lambda: optax.constant_schedule(peak),
  }[config.decay]()
  # The first step of the warm-up already moves: 1/n, 2/n, ... of the peak.
  warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, max(config.warmup_steps - 1, 1))
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def _labels(params):
  """ "policy" for the heads of a count policy, "model" for the rest."""

  def label(path, _):
    name = path[-1].key
    # Attention has a value_DMH, which is no part of a policy.
    return "policy" if name.startswith("policy_") or name in ("value_in", "value_bias", "value_out") else "model"

  return jax.tree_util.tree_map_with_path(label, params)


def _is_matrix(params):
  """Weight decay is for matrices: not for gains, biases and thresholds, whose last axis is their only one."""
  names = ("gain_", "policy_bias", "query_bias", "key_bias", "value_bias", "log_scale", "threshold_E")
  return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.startswith(names), params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """As optax's, but multiplying by one factor, which XLA fuses into the update.

  optax divides; XLA on CPU then stores the quotients and reads them twice: half of an update's time.
  """

  def update(updates, state, params=None):
    del params
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.global_norm(updates), 1e-30))
    return jax.tree.map(lambda g: g * factor, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """Returns the optimizer of `config`.

  The policy's gradient is noise for the most part. Clipped together with the
  model's it would scale the model's updates at random, so each has its own norm.
  """

  def adamw():
    return optax.chain(
      clip_by_global_norm(config.clip_norm),
      optax.adamw(
        learning_rate_schedule(config), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=_is_matrix
      ),
    )

  return optax.multi_transform({"model": adamw(), "policy": adamw()}, _labels)
