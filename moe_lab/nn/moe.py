"""The mixture-of-experts layer: router, dispatch, experts, shared experts."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.nn.layers import scaled_normal
from moe_lab.nn.mlp import MLP
from moe_lab.nn.weights import Weight, watch_experts
from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.routing.base import Assignment, RouterContext, RouterStats
from moe_lab.routing.cap import capped
from moe_lab.routing.dispatch import dispatch, experts_backend
from moe_lab.routing.dropout import jittered, scattered
from moe_lab.routing.registry import make_router
from moe_lab.sharding.expert import expert_parallel, platform, splits


class Routed(NamedTuple):
  """A layer's result without that of its experts, whose weights are elsewhere (`infer/offload.py`).

  Attributes:
    x_TD: the layer's input, for the experts.
    assignment: who is to compute it.
    rest_TD: what is added to their results: of shared experts, and of those that give the input back.
  """

  x_TD: jax.Array
  assignment: Assignment
  rest_TD: jax.Array


class MoE(nn.Module):
  """Routes each token to some experts and adds their gated results.

  Attributes:
    out_scale: factor on the initial weights of the outputs.
    mesh: of the devices that share the tokens and the experts; None: one device.
    traced: whether the statistics are to have each token's choice of experts.
    apart: whether the experts are computed by the caller: `Routed` takes the place of the result.
  """

  model: ModelConfig
  routing: RoutingConfig
  out_scale: float
  mesh: jax.sharding.Mesh | None = None
  traced: bool = False
  apart: bool = False

  @nn.compact
  def __call__(self, x_TD, context: RouterContext) -> tuple[jax.Array | Routed, RouterStats]:
    """Returns y_TD (or `Routed`) and the layer's statistics."""
    model, routing = self.model, self.routing
    num_experts, dim, hidden = model.num_experts, model.dim, model.expert_dim
    router = make_router(routing)
    parameters = {
      name: self.param(name, scaled_normal(std), shape, jnp.float32)
      for name, (shape, std) in router.parameters(model).items()
    }
    assignment, stats = router(parameters, jittered(x_TD, routing.router_jitter, context), context)
    if not self.traced:
      stats = stats._replace(choice=None)
    assignment = scattered(assignment, num_experts, routing.gating_dropout, context)
    if context.caps is not None:
      assignment = capped(assignment, context.caps, max(routing.k_min, 1))
      # Of the statistics only the counts are what was spent: the others say what the router wanted, and train nobody.
      stats = stats._replace(count_T=assignment.valid_TK.sum(-1))

    if self.apart:
      rest_TD = self._add_rest(jnp.zeros_like(x_TD), x_TD, assignment)
      return Routed(x_TD, assignment, rest_TD), stats

    inward, outward = (num_experts, dim, hidden), (num_experts, hidden, dim)
    declared = [
      Weight(self, "gate_EDF", dim**-0.5, inward),
      Weight(self, "up_EDF", dim**-0.5, inward),
      Weight(self, "down_EFD", self.out_scale * hidden**-0.5, outward),
    ]
    weights = ExpertWeights(*(w.stored() for w in declared))
    watch_experts(self, x_TD, assignment, weights)
    # Capacity drops tokens by their neighbours; at inference (no key) nothing may depend on them.
    backend = "ragged" if model.dispatch == "capacity" and context.key is None else model.dispatch
    batch = context.num_sequences
    if backend in ("auto", "ragged") and splits(self.mesh, batch, x_TD.shape[0] // batch):
      y_TD = expert_parallel(x_TD, assignment, weights, self.mesh, batch=batch, grouped_matmul=model.grouped_matmul)
      dropped = jnp.zeros(())
    else:
      experts = experts_backend(model.grouped_matmul, platform(self.mesh))
      capacity = math.ceil(model.capacity_factor * x_TD.shape[0] * routing.mean_count / num_experts)
      y_TD, dropped = dispatch(x_TD, assignment, weights, backend=backend, capacity=capacity, experts=experts)
    return self._add_rest(y_TD, x_TD, assignment), stats._replace(dropped_sum=dropped)

  def _add_rest(self, y_TD, x_TD, assignment: Assignment) -> jax.Array:
    """Adds what every token gets beside its experts' results."""
    model = self.model
    if assignment.identity_T is not None:
      y_TD += assignment.identity_T[:, None].astype(x_TD.dtype) * x_TD
    if model.shared_width:
      # One MLP of the joint width is the same function as so many experts that every token takes.
      shared_TD = MLP(model.shared_width, self.out_scale, name="shared")(x_TD)
      if model.shared_gate:
        gate_D = self.param("shared_gate_D", scaled_normal(model.dim**-0.5), (model.dim,), jnp.float32)
        shared_TD *= jax.nn.sigmoid(x_TD.astype(jnp.float32) @ gate_D)[:, None].astype(x_TD.dtype)
      y_TD += shared_TD
    return y_TD
