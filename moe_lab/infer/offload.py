"""Generation with most experts in host memory: layer by layer, what a router takes is fetched when it has chosen.

Everything but the experts lies in the accelerator's memory, and of each layer's experts the least recently used
`resident` ones (arXiv 2312.17238). A step's programs are the engine's own (`programs.py`), cut where the host has to
look: before each layer's experts. So beside the bytes of what is missing a step costs three programs and a look of the
host a layer. It gives what the engine without it does.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError
from moe_lab.infer import programs
from moe_lab.infer.residents import Residents, in_order_of_use
from moe_lab.nn.block import Block, LayerInputs, SharedInputs
from moe_lab.nn.layers import RMSNorm
from moe_lab.nn.moe import Routed
from moe_lab.nn.transformer import Output, Transformer, embed
from moe_lab.nn.weights import FAMILIES, part_name, stored_in
from moe_lab.ops.grouped_mlp import ExpertWeights
from moe_lab.ops.quantised import BOOKS
from moe_lab.routing.base import Decisions, RouterState, RouterStats
from moe_lab.routing.dispatch import dispatch, experts_backend

_HOST = "pinned_host"  # the kind of memory that transfers need not copy out of first
_EXPERTS = FAMILIES["experts"]
_NAMES = {*_EXPERTS, *(part_name(name, part) for name in _EXPERTS for part in (*BOOKS, "scale"))}  # of parameters


class Offloaded:
  """A model whose experts are fetched; it takes the place of the engine's two programs.

  Attributes:
    params: served ones, without those of the experts.
    expert_bytes: of one expert of one layer.
  """

  def __init__(self, config: Config, params: dict, resident: int | Sequence[int]):
    """Puts every expert into host memory.

    Args:
      config: of the model.
      params: as an engine takes them (`placement.served`); if they are arrays of numpy, the experts are never on the
        accelerator all at once.
      resident: experts that stay: of each mixture-of-experts layer as many, or [Z].

    Raises:
      ConfigError: the model has adapters, or no experts.
      UserError: it has fewer experts than are to stay.
    """
    model = config.model
    if config.adapt.lora_rank:
      raise ConfigError(
        "adapt.lora_rank", config.adapt.lora_rank, "0: adapters are merged before experts are offloaded"
      )
    num_moe = model.num_layers - model.num_dense_layers
    if not num_moe:
      raise ConfigError("model.num_dense_layers", model.num_dense_layers, "fewer: the model has no experts to offload")
    resident_Z = np.broadcast_to(resident, num_moe).tolist()
    if not 0 <= min(resident_Z) <= max(resident_Z) <= model.num_experts:
      raise UserError(f"resident_experts={resident}: wanted from 0 to {model.num_experts}, the experts of a layer")
    self._config = config
    self._device = SingleDeviceSharding(jax.devices()[0])
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    host = self._device.with_memory_kind(_HOST) if _HOST in kinds else None
    self._experts_ZE = [
      [_experts_of(params[f"moe_layers_{z}"]["moe"], config, e, host) for e in range(model.num_experts)]
      for z in range(num_moe)
    ]
    self.params = jax.device_put(
      jax.tree_util.tree_map_with_path(lambda path, leaf: None if path[-1].key in _NAMES else leaf, params),
      self._device,
    )
    self.expert_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._experts_ZE[0][0]))
    self.residents = Residents(resident_Z, config.routing.slots)
    self._pool = jax.tree.map(
      lambda leaf: jnp.zeros((self.residents.num_slots, *leaf.shape), leaf.dtype), self._experts_ZE[0][0]
    )

    whole = Transformer(config, unrolled=True)
    self._begin = jax.jit(functools.partial(_begin, config))
    self._dense = jax.jit(functools.partial(_layer, config, False), donate_argnums=3)
    self._routed = jax.jit(functools.partial(_layer, config, True), donate_argnums=3)
    self._put = jax.jit(_put, donate_argnums=0)
    self._compute = jax.jit(functools.partial(_compute, config))
    self._add = jax.jit(_add)
    self._end = jax.jit(functools.partial(_end, config))
    self._after_chunk = {
      scored: jax.jit(functools.partial(programs.after_chunk, whole, scored), donate_argnums=1)
      for scored in (False, True)
    }
    self._after_step = jax.jit(functools.partial(programs.after_step, whole), donate_argnums=(1, 2))
    self._nothing_made = jax.jit(functools.partial(programs.nothing_made, whole), static_argnums=(0, 1))
    self._only_live = jax.jit(programs.only_live)

  @property
  def moved_bytes(self) -> int:
    """Bytes of experts that came from the host so far."""
    return self.expert_bytes * int(self.residents.fetched_Z.sum())

  @property
  def pool_bytes(self) -> int:
    """Bytes of the experts' room on the accelerator."""
    return self.expert_bytes * self.residents.num_slots

  def read(self, rows: int | None, scored: bool, params, router_state, cache, slots, chunk: programs.Chunk):
    """As `programs.read`."""
    out = self._forward(params, router_state, cache, programs.inputs_of_chunk(rows, chunk))
    return out.cache, *self._after_chunk[scored](out._replace(cache=None), slots, chunk)

  def decode(self, rows: int | None, steps: int, params, router_state, cache, slots, live_B: np.ndarray):
    """As `programs.decode`."""
    slots, made = self._only_live(slots, live_B), self._nothing_made(steps, live_B.size)
    for step in range(steps):
      if not np.any(jax.device_get(slots.left) > 0):
        break
      out = self._forward(params, router_state, cache, programs.inputs_of_step(rows, slots))
      cache = out.cache
      slots, made = self._after_step(out._replace(cache=None), slots, made, step)
    return cache, slots, made

  def _forward(self, params, router_state: RouterState, cache, inputs: programs.Inputs) -> Output:
    """As the `Transformer`; of the statistics only the counts are there."""
    num_dense, new_cache, counts = self._config.model.num_dense_layers, [], []
    x_BLD, shared = self._begin(params, inputs)
    for z in range(num_dense):
      x_BLD, _, layer_cache = self._dense(params[f"dense_layers_{z}"], x_BLD, shared, cache[z], None)
      new_cache.append(layer_cache)
    for z in range(len(self._experts_ZE)):
      layer, state = params[f"moe_layers_{z}"], jax.tree.map(lambda leaf, z=z: leaf[z], router_state)
      (x_BLD, routed), count_T, layer_cache = self._routed(layer, x_BLD, shared, cache[num_dense + z], state)
      x_BLD = self._add(x_BLD, routed, self._expert_results(z, routed))
      new_cache.append(layer_cache)
      counts.append(count_T)
    return self._end(params, x_BLD, counts)._replace(cache=tuple(new_cache))

  def _expert_results(self, z: int, routed: Routed) -> jax.Array:
    """Returns what a layer's experts give, whose weights are fetched where they are missing."""
    expert_TK, valid_TK = jax.device_get((routed.assignment.expert_TK, routed.assignment.valid_TK))
    y_TD = None
    for fetched, computed in self.residents.passes(z, in_order_of_use(expert_TK, valid_TK)):
      for expert, slot in fetched:
        self._pool = self._put(self._pool, jax.device_put(self._experts_ZE[z][expert], self._device), slot)
      slot_E = np.full(self._config.model.num_experts, -1, np.int32)
      slot_E[list(computed)] = list(computed.values())
      part_TD = self._compute(self._pool, routed, slot_E)
      y_TD = part_TD if y_TD is None else y_TD + part_TD
    return jnp.zeros_like(routed.x_TD) if y_TD is None else y_TD


def _experts_of(params: dict, config: Config, expert: int, host) -> ExpertWeights:
  """Returns the weights of one expert, in host memory: that of a kind where there are kinds, else arrays of numpy."""
  sizes = {"gate_EDF": config.model.dim, "up_EDF": config.model.dim, "down_EFD": config.model.expert_dim}
  weights = ExpertWeights(*(stored_in(params, name, size) for name, size in sizes.items()))
  one = jax.tree.map(lambda leaf: np.asarray(leaf[expert]), weights)
  return one if host is None else jax.device_put(one, host)


def _begin(config: Config, params: dict, inputs: programs.Inputs) -> tuple[jax.Array, SharedInputs]:
  x_BLD = embed(params["embedding_VD"], inputs.token_BL, config.model)
  return x_BLD, SharedInputs(
    inputs.segment_BL, jnp.asarray(inputs.offset, jnp.int32), inputs.budget_B, x_BLD, None, inputs.caps, inputs.row_B
  )


def _layer(config: Config, moe: bool, params: dict, x_BLD, shared: SharedInputs, cache, state: RouterState | None):
  """Returns a layer's result (without its experts', if it has any), its counts, and its cache."""
  block = Block(config.model, config.routing, moe, apart=moe)
  inputs = LayerInputs(state, None, Decisions(), cache)
  x_BLD, (stats, cache) = block.apply({"params": params}, x_BLD, inputs, shared)
  return x_BLD, stats.count_T if moe else None, cache


def _put(pool: ExpertWeights, expert: ExpertWeights, slot) -> ExpertWeights:
  return jax.tree.map(lambda all_, one: all_.at[slot].set(one), pool, expert)


def _compute(config: Config, pool: ExpertWeights, routed: Routed, slot_E) -> jax.Array:
  """Returns what those experts give that have a slot of the pool."""
  assignment = routed.assignment
  slot_TK = jnp.asarray(slot_E)[assignment.expert_TK]
  here_TK = assignment.valid_TK & (slot_TK >= 0)
  here = assignment._replace(
    expert_TK=jnp.where(here_TK, slot_TK, 0), gate_TK=jnp.where(here_TK, assignment.gate_TK, 0.0), valid_TK=here_TK
  )
  model = config.model
  backend = "ragged" if model.dispatch == "capacity" else model.dispatch
  experts = experts_backend(model.grouped_matmul, jax.default_backend())
  return dispatch(routed.x_TD, here, pool, backend=backend, experts=experts)[0]


def _add(x_BLD, routed: Routed, y_TD) -> jax.Array:
  return x_BLD + (y_TD + routed.rest_TD).reshape(x_BLD.shape)


def _end(config: Config, params: dict, x_BLD, counts: Sequence[jax.Array]) -> Output:
  hidden_BLD = RMSNorm(config.model.norm_epsilon).apply({"params": params["final_norm"]}, x_BLD)
  stats = RouterStats(*[None] * len(RouterStats._fields[:-1]))._replace(count_T=jnp.stack(counts))
  return Output(hidden_BLD, params.get("head_VD", params["embedding_VD"]), stats, None)
