"""The decoder: embedding, dense layers, mixture-of-experts layers, head."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_lab.config.schema import Config, ModelConfig
from moe_lab.nn.attention import LayerCache
from moe_lab.nn.block import Block, LayerInputs, SharedInputs
from moe_lab.nn.layers import RMSNorm, scaled_normal
from moe_lab.nn.weights import WATCHED
from moe_lab.routing.base import Caps, Decisions, RouterState, RouterStats, stats_without_experts
from moe_lab.sharding.rules import spread

_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_saveable, "full": jax.checkpoint_policies.nothing_saveable}


class Output(NamedTuple):
  """What a forward pass returns.

  Attributes:
    hidden_BLD: after the final norm, in the activations' type.
    head_VD: the output embedding; a loss over the vocabulary reads both (`ops/cross_entropy.py`).
    stats: of the mixture-of-experts layers, leading axis Z; without any, as of one layer that takes no expert.
    cache: the updated cache, layer by layer; None if none was given.
  """

  hidden_BLD: jax.Array
  head_VD: jax.Array
  stats: RouterStats
  cache: tuple[LayerCache, ...] | None

  @property
  def logits_BLV(self) -> jax.Array:
    """Logits of every position, float32. Where a few will do, cut `hidden_BLD` and call `head`."""
    return head(self.hidden_BLD, self.head_VD)


def head(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D]."""
  return jnp.einsum("...D,VD->...V", hidden, head_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)


def embed(embedding_VD: jax.Array, token_BL: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns the layers' input x_BLD, in the activations' type."""
  # The embedding is the head too, where variance 1/D is right; as input it wants variance 1.
  scale = config.dim**0.5 if config.scale_embeddings else 1.0
  return (embedding_VD[token_BL] * scale).astype(config.dtype)


class Transformer(nn.Module):
  """A decoder-only language model. Pure: everything that varies is an argument.

  Attributes:
    mesh: of the devices that share the tokens and the parameters (`sharding/rules.py`); None: one device.
    unrolled: every layer has parameters of its own (`unstack_layers`), and is compiled by itself. A scan copies each
      layer's weights out of the stack, which hardly counts in training and is most of the time of decoding.
    traced: the statistics have each token's choice of experts.
  """

  config: Config
  mesh: jax.sharding.Mesh | None = None
  unrolled: bool = False
  traced: bool = False

  @nn.compact
  def __call__(
    self,
    token_BL: jax.Array,
    segment_BL: jax.Array,
    budget_B: jax.Array,
    router_state: RouterState,
    *,
    key: jax.Array | None = None,
    decisions: Decisions = Decisions(),
    greedy_B: jax.Array | None = None,
    caps: Caps | None = None,
    cache: tuple[LayerCache, ...] | None = None,
    offset: jax.Array | int = 0,
    row_B: jax.Array | None = None,
  ) -> Output:
    """Predicts the next token at every position.

    Args:
      token_BL: int32.
      segment_BL: int32, documents; attention stays within one; 0 is padding.
      budget_B: float32, mean experts asked of each sequence.
      router_state: [Z, ...] over the mixture-of-experts layers.
      key: randomness of training; None: inference, counts by the greedy rule.
      decisions: [Z, T...] choices to replay.
      greedy_B: bool, sequences whose counts are by the greedy rule although there is a key; None: no such.
      caps: upper bounds on the experts of a token and of the batch; None: the router's own count.
      cache: keys and values of earlier tokens; the new ones go to `offset`. Only for unrolled layers.
      offset: position of the first token; [B] with a cache.
      row_B: int32, the cache's row of each sequence; None: each in its place, a cache of B rows.
    """
    if cache is not None and not self.unrolled:
      raise ValueError("a cache needs unrolled layers: a scan would copy all of it at each")
    config = self.config.model
    embedding_VD = self.param(
      "embedding_VD", scaled_normal(config.dim**-0.5), (self.config.data.vocab_size, config.dim), jnp.float32
    )
    x_BLD = spread(embed(embedding_VD, token_BL, config), self.mesh)
    offset, embedding_BLD = jnp.asarray(offset, jnp.int32), jax.lax.stop_gradient(x_BLD)
    shared = SharedInputs(segment_BL, offset, budget_B, embedding_BLD, greedy_B, caps, row_B)

    num_dense = config.num_dense_layers
    block = Block
    if config.remat != "none":
      block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[config.remat])
    stats, new_cache = None, ()
    for is_moe, layers in ((False, slice(0, num_dense)), (True, slice(num_dense, config.num_layers))):
      num_layers = layers.stop - layers.start
      if num_layers == 0:
        continue
      layer_cache = None if cache is None else cache[layers]
      keys = None if key is None else jax.random.split(key, num_layers)
      dense_inputs = LayerInputs(None, None, Decisions(), layer_cache)
      inputs = LayerInputs(router_state, keys, decisions, layer_cache) if is_moe else dense_inputs
      name = "moe_layers" if is_moe else "dense_layers"
      run = self._unrolled if self.unrolled else self._scanned
      # Where there are mixtures of experts they come last: theirs are the statistics that remain.
      x_BLD, (stats, layer_cache) = run(block, name, num_layers, is_moe, x_BLD, inputs, shared)
      new_cache += layer_cache or ()

    if stats is None:
      stats = stats_without_experts((segment_BL != 0).reshape(-1), config.num_experts, self.config.routing.slots)
      stats = stats if self.traced else stats._replace(choice=None)
    x_BLD = RMSNorm(config.norm_epsilon, name="final_norm")(x_BLD)
    head_VD = embedding_VD
    if not config.tie_embeddings:
      head_VD = self.param("head_VD", scaled_normal(config.dim**-0.5), embedding_VD.shape, jnp.float32)
    return Output(x_BLD, head_VD, stats, None if cache is None else new_cache)

  def _scanned(self, block, name: str, num_layers: int, is_moe: bool, x_BLD, inputs: LayerInputs, shared: SharedInputs):
    """Runs layers whose parameters are stacked, [Z, ...]; so are what they are given and what they return."""
    layers = nn.scan(
      block,
      variable_axes={"params": 0, WATCHED: 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=num_layers,
    )
    return layers(self.config.model, self.config.routing, is_moe, self.mesh, self.traced, name=name)(
      x_BLD, inputs, shared
    )

  def _unrolled(
    self, block, name: str, num_layers: int, is_moe: bool, x_BLD, inputs: LayerInputs, shared: SharedInputs
  ):
    """As `_scanned`, one by one, with parameters NAME_0, NAME_1, ...; only the cache is not stacked."""
    caches, inputs, outputs = inputs.cache or [None] * num_layers, inputs._replace(cache=None), []
    for z, cache in enumerate(caches):
      layer = block(self.config.model, self.config.routing, is_moe, self.mesh, self.traced, name=f"{name}_{z}")
      layer_inputs = jax.tree.map(lambda leaf, z=z: leaf[z], inputs)._replace(cache=cache)
      x_BLD, output = layer(x_BLD, layer_inputs, shared)
      outputs.append(output)
    stats, caches = zip(*outputs, strict=True)
    return x_BLD, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats), caches)


def unstack_layers(params: dict) -> dict:
  """Returns the parameters of a scanned `Transformer` as an unrolled one wants them."""
  unstacked = {}
  for name, value in params.items():
    if name in ("moe_layers", "dense_layers"):
      for z in range(jax.tree.leaves(value)[0].shape[0]):
        unstacked[f"{name}_{z}"] = jax.tree.map(lambda leaf, z=z: leaf[z], value)
    else:
      unstacked[name] = value
  return unstacked
