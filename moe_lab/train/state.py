"""Everything that decides how training goes on."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_lab.adapt.learning import join, split
from moe_lab.adapt.lora import adapters, merged
from moe_lab.adapt.quantise import plain, quantised
from moe_lab.adapt.tensors import tensors
from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import RouterState
from moe_lab.routing.budget import BudgetState, initial_budget_state
from moe_lab.routing.registry import make_router
from moe_lab.train.optimizer import make_optimizer

ADAPTER_STREAM = 1_000_004  # of the seed's key, beside the model's own


class TrainState(NamedTuple):
  """The whole state of training but for the data's position; a pytree of arrays.

  Attributes:
    step: int32 [], updates done or skipped; randomness is derived from it.
    params: the model's.
    opt_state: the optimizer's, of the parameters that learn (`adapt/learning.py`).
    router_state: balance biases, running loads, greedy calibration, the method's own, [Z, ...].
    budget_state: the budget controller's.
    skipped_in_a_row: int32 [], updates skipped since the last good one.
    usual_norm: float32 [], running mean of the gradient's norm; 0: there was none yet.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  router_state: RouterState
  budget_state: BudgetState
  skipped_in_a_row: jax.Array
  usual_norm: jax.Array


def adapter_key(config: Config) -> jax.Array:
  """Returns what the adapters' start is drawn by."""
  return jax.random.fold_in(jax.random.key(config.train.seed), ADAPTER_STREAM)


def in_form(params: Any, config: Config) -> Any:
  """Returns plain parameters in the form that `config.adapt` says: without calibration, and adapters at their start."""
  begun = params
  if config.adapt.weights != "float32":
    params = quantised(begun, config.adapt.weights)
  if config.adapt.lora_rank:
    params = join(adapters(begun, config, adapter_key(config)), params)
  return params


def initial_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step; deterministic in `config.train.seed`."""
  token_BL = jnp.zeros((1, 8), jnp.int32)
  variables = Transformer(config).init(
    jax.random.key(config.train.seed), token_BL, token_BL + 1, jnp.full(1, config.routing.budget), _router_state(config)
  )
  return state_of(config, in_form(variables["params"], config), optimizer)


def state_of(config: Config, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step of a model with these parameters, in the form that `config.adapt` says."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(split(params, config.adapt)[0]),
    router_state=_router_state(config),
    budget_state=initial_budget_state(config.routing),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    usual_norm=jnp.zeros(()),
  )


def _router_state(config: Config) -> RouterState:
  return make_router(config.routing).initial_state(config.model.routed_layers, config.model.num_experts)


def abstract_state(config: Config) -> TrainState:
  """Returns the shapes and types of `initial_state`, computing nothing."""
  return jax.eval_shape(lambda: initial_state(config, make_optimizer(config.train)))


def abstract_plain_params(config: Config) -> Any:
  """Returns the shapes of the model's parameters as they are before any adaptation."""
  return abstract_state(dataclasses.replace(config, adapt=AdaptConfig())).params


def plain_params(params: Any, config: Config) -> dict:
  """Returns parameters of any form as float32 arrays without adapters: the same model, as `merged` and `plain` say."""
  return merged(plain(params, tensors(abstract_plain_params(config))))
