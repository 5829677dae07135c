"""One decoder layer, and what it is given besides the hidden states."""

from typing import NamedTuple

import flax.linen as nn
import jax
from einops import repeat

from moe_lab.config.schema import ModelConfig, RoutingConfig
from moe_lab.nn.attention import Attention, LayerCache
from moe_lab.nn.layers import RMSNorm
from moe_lab.nn.mlp import MLP
from moe_lab.nn.moe import MoE
from moe_lab.routing.base import Caps, Decisions, RouterContext, RouterState, RouterStats


class LayerInputs(NamedTuple):
  """What differs from layer to layer; scan cuts the leading Z away."""

  state: RouterState | None
  key: jax.Array | None
  decisions: Decisions
  cache: LayerCache | None


class SharedInputs(NamedTuple):
  """What every layer sees alike.

  Attributes:
    segment_BL: int32, document of each token; 0 is padding.
    offset: int32 [], position of the first token; [B] with a cache.
    budget_B: float32, the mean count asked for.
    embedding_BLD: input embeddings, without gradient.
    greedy_B: bool, sequences whose counts are the inference rule's although there is a key; None: no such.
    caps: upper bounds on the experts; None: the router's own count.
    row_B: int32, the cache's row of each sequence; None: each in its place.
  """

  segment_BL: jax.Array
  offset: jax.Array
  budget_B: jax.Array
  embedding_BLD: jax.Array
  greedy_B: jax.Array | None = None
  caps: Caps | None = None
  row_B: jax.Array | None = None


class Block(nn.Module):
  """Pre-norm attention and MLP or MoE, each added to the residual stream.

  Attributes:
    traced: whether the statistics are to have each token's choice of experts.
    apart: see `MoE`; then the result is (x_BLD before it, `Routed`) in place of x_BLD.
  """

  model: ModelConfig
  routing: RoutingConfig
  moe: bool
  mesh: jax.sharding.Mesh | None = None
  traced: bool = False
  apart: bool = False

  @nn.compact
  def __call__(
    self, x_BLD, layer: LayerInputs, shared: SharedInputs
  ) -> tuple[jax.Array, tuple[RouterStats | None, LayerCache | None]]:
    """Returns x_BLD and, for scan to stack, the layer's statistics and cache."""
    # Residual branches shrink with depth, so that the stream's variance does not grow with it (GPT-2).
    out_scale, epsilon = (2 * self.model.num_layers) ** -0.5, self.model.norm_epsilon
    attended, cache = Attention(self.model, out_scale, self.mesh, name="attention")(
      RMSNorm(epsilon, name="attention_norm")(x_BLD), shared.segment_BL, shared.offset, layer.cache, shared.row_B
    )
    x_BLD = x_BLD + attended
    normed_BLD = RMSNorm(epsilon, name="mlp_norm")(x_BLD)
    if not self.moe:
      return x_BLD + MLP(self.model.dense_dim, out_scale, name="mlp")(normed_BLD), (None, cache)

    length, dim = x_BLD.shape[1:]

    def per_token(value_B):
      # Not `jnp.repeat` with a total length: it sums constants cumulatively, which XLA evaluates while it
      # compiles, in time that grows with the square of the tokens: minutes for the millions of a pod.
      return repeat(value_B, "B -> (B l)", l=length)

    context = RouterContext(
      mask_T=(shared.segment_BL != 0).reshape(-1),
      budget_T=per_token(shared.budget_B),
      embedding_TD=shared.embedding_BLD.reshape(-1, dim),
      state=layer.state,
      key=layer.key,
      decisions=layer.decisions,
      budget_B=shared.budget_B,
      greedy_T=None if shared.greedy_B is None else per_token(shared.greedy_B),
      caps=None if shared.caps is None else shared.caps._replace(experts=per_token(shared.caps.experts)),
    )
    moe = MoE(self.model, self.routing, out_scale, self.mesh, self.traced, self.apart, name="moe")
    y_TD, stats = moe(normed_BLD.reshape(-1, dim), context)
    if self.apart:
      return (x_BLD, y_TD), (stats, cache)
    return x_BLD + y_TD.reshape(x_BLD.shape), (stats, cache)
