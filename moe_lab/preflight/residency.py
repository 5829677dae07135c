"""A plan for a model that is larger than one accelerator's memory: what stays there, and what is fetched from the host.

Everything but the experts stays: every token needs it. Of the experts as many stay as still fit, the most loaded ones,
and the rest lies in host memory, from where an expert is moved whenever a token takes it (arXiv 2312.17238). Nothing
is allocated: sizes are those of abstract arrays. It is a plan, not a measurement; `infer/offload.py` decodes so, with
those resident that were used last, and moves what `lru_misses` counts.

What a decoding token moves is reckoned without reuse: a missed expert is not kept for the next token, so the resident
ones stay who they are. With an even load that is n missed of N experts times the budget, and no cache does better on
tokens that choose independently; a trained router's choices repeat, and `lru_misses` counts what a cache of the
recently used would make of a trace of them. Reading prompts moves less a token, since a chunk shares what it fetches.
"""

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe_lab.adapt.tensors import Path, part_of, spelled, tensors
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError
from moe_lab.infer.cache import cache_bytes
from moe_lab.infer.placement import served
from moe_lab.infer.residents import in_order_of_use
from moe_lab.nn.weights import FAMILY
from moe_lab.train.state import abstract_state

GB = 10**9
# For activations and the program, by default: a round figure, not a measurement. The largest known piece of medium_50b
# is a projection that is unpacked to float32, 67 MB.
RESERVE = GB
FAMILIES = ("experts", "attention", "mlp", "router", "count_heads", "norms", "embedding", "head", "routing_state")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What lies where, in bytes.

  Attributes:
    memory: of the accelerator.
    weights: by family (`FAMILIES`), as an engine holds them, all experts included.
    cache: keys and values of all sequences.
    reserve: for activations and the program.
    staging: room for the experts that one token of one layer takes, which missed ones are moved into; 0 if all fit.
    expert: one expert of one layer, scales included; 0 in a model without.
    budget: mean experts of a token and layer.
    taken_ZE: float64, how often a token takes each expert of each mixture-of-experts layer.
    resident_ZE: bool, which experts stay.
  """

  memory: int
  weights: dict[str, int]
  cache: int
  reserve: int
  staging: int
  expert: int
  budget: float
  taken_ZE: np.ndarray
  resident_ZE: np.ndarray

  @property
  def fixed(self) -> int:
    """Bytes of everything that has to stay."""
    return sum(self.weights.values()) - self.weights["experts"] + self.cache + self.reserve + self.staging

  @property
  def resident(self) -> int:
    """Bytes that are taken, of `memory`."""
    return self.fixed + self.expert * int(self.resident_ZE.sum())

  @property
  def offloaded(self) -> int:
    """Bytes of experts in host memory."""
    return self.expert * int((~self.resident_ZE).sum())

  @property
  def missed_Z(self) -> np.ndarray:
    """Experts that a token takes of those in host memory, by layer; a mean over tokens."""
    return np.where(self.resident_ZE, 0.0, self.taken_ZE).sum(1)

  @property
  def moved_per_token(self) -> float:
    """Bytes from the host for a decoding token, a mean over tokens, if nothing that was moved is used again."""
    return self.expert * float(self.missed_Z.sum())


def family_of(path: Path) -> str:
  """Returns which of `FAMILIES` a parameter of any form but an adapter counts to."""
  name, part = path[-1], part_of(path[-1])
  name = name if part is None else name.replace(f"_{part}_", "_")
  if name in FAMILY:
    return FAMILY[name]
  if name in ("embedding_VD", "head_VD"):
    return name.removesuffix("_VD")
  if name.startswith("gain_"):
    return "norms"
  if path[-2] == "attention":  # biases
    return "attention"
  if name == "shared_gate_D":
    return "mlp"
  assert path[-2] == "moe", f"{spelled(path)} is of no family"
  return "count_heads" if name.startswith(("policy_", "value_")) else "router"


def bytes_by_family(params: Any, router_state: Any) -> dict[str, int]:
  """Returns the bytes of a model's arrays, abstract or not, by family."""
  held = dict.fromkeys(FAMILIES, 0)
  for path, leaf in tensors(params).items():
    held[family_of(path)] += _bytes_of(leaf)
  held["routing_state"] = sum(map(_bytes_of, jax.tree.leaves(router_state)))
  return held


def _bytes_of(leaf: Any) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def plan(
  config: Config,
  memory: int,
  context: int,
  *,
  sequences: int = 1,
  chunk: int = 128,
  budget: float | None = None,
  reserve: int = RESERVE,
  load_ZE: np.ndarray | None = None,
) -> Plan:
  """Returns what of a model is resident and what is offloaded.

  Args:
    config: of the model; `adapt.weights` says whether experts and projections are in 4 bits.
    memory: bytes of the accelerator.
    context: positions that each sequence has room for.
    sequences: that are decoded together.
    chunk: tokens of a prompt that are read at a time.
    budget: mean experts of a token and layer; None: the configuration's.
    reserve: bytes for activations and the program.
    load_ZE: rows by expert, of the same tokens in each mixture-of-experts layer; only their proportions count, the
      mean over layers is the budget. None: even, of which a plan moves the most.

  Raises:
    ConfigError: adapters that are not merged.
    UserError: a budget that tokens can't have, or less memory than what has to stay.
  """
  model, routing = config.model, config.routing
  if config.adapt.lora_rank:
    raise ConfigError("adapt.lora_rank", config.adapt.lora_rank, "0: adapters are merged before a plan is made")
  budget = routing.mean_count if budget is None else budget
  low, high = (routing.k, routing.k) if routing.fixed else (routing.k_min, routing.k_max)
  if not low <= budget <= high:
    raise UserError(f"--budget={budget:g}: wanted {low if low == high else f'a number from {low} to {high}'}")
  state = abstract_state(config)
  params = jax.eval_shape(functools.partial(served, config=model), state.params)
  weights = bytes_by_family(params, state.router_state)
  shape = model.num_layers - model.num_dense_layers, model.num_experts
  number = math.prod(shape)
  expert = weights["experts"] // max(number, 1)
  assert expert * number == weights["experts"], "experts differ in size"
  cache = cache_bytes(model, sequences, context, chunk)

  fixed = sum(weights.values()) - weights["experts"] + cache + reserve
  staging = 0 if fixed + weights["experts"] <= memory else routing.slots * expert
  room = memory - fixed - staging
  if room < 0:
    parts = (
      f"weights {_gb(fixed - cache - reserve)}, cache {_gb(cache)}, reserve {_gb(reserve)}, staging {_gb(staging)}"
    )
    raise UserError(
      f"a memory of {_gb(memory)} GB: wanted at least {_gb(fixed + staging)} GB for all but the experts ({parts})"
    )
  taken_ZE = _taken(load_ZE, shape, budget)
  resident_ZE = _most_loaded(taken_ZE, min(room // expert, number) if number else 0)
  return Plan(memory, weights, cache, reserve, staging, expert, budget, taken_ZE, resident_ZE)


def _taken(load_ZE: np.ndarray | None, shape: tuple[int, int], budget: float) -> np.ndarray:
  """Returns how often a token takes each expert, [Z, E]: the load, scaled to the budget."""
  load_ZE = np.ones(shape) if load_ZE is None else np.asarray(load_ZE, np.float64)
  if load_ZE.shape != shape:
    raise ValueError(f"a load of shape {load_ZE.shape}: wanted {shape}")
  if load_ZE.size == 0:
    return load_ZE
  if not load_ZE.sum() > 0 or load_ZE.min() < 0:
    raise ValueError("a load: wanted numbers from 0, not all of them 0")
  taken_ZE = load_ZE / load_ZE.sum() * budget * shape[0]
  if taken_ZE.max() > 1 + 1e-9:
    raise UserError(f"--budget={budget:g}: with this load a token would take an expert {taken_ZE.max():.2f} times")
  return taken_ZE


def _most_loaded(taken_ZE: np.ndarray, number: int) -> np.ndarray:
  """Returns bool [Z, E], true for so many of the most loaded; of equal ones, as many from each layer as can be."""
  layer, expert = np.indices(taken_ZE.shape).reshape(2, -1)
  order = np.lexsort((layer, expert, -taken_ZE.ravel()))
  resident = np.zeros(taken_ZE.size, bool)
  resident[order[:number]] = True
  return resident.reshape(taken_ZE.shape)


def lru_misses(
  expert_ZTK: np.ndarray, valid_ZTK: np.ndarray, capacity: int | Sequence[int], step_T: np.ndarray | None = None
) -> np.ndarray:
  """Counts what a cache of the least recently used experts in each layer would have to fetch (arXiv 2312.17238).

  A step finds what was in the cache when it came; all that its tokens took, one after the other and each one's best
  expert last, then counts as just used. Caches start empty.

  Args:
    expert_ZTK: ids in the order of decoding, a token's best first (`routing.base.Choice`).
    valid_ZTK: bool, slots in use.
    capacity: experts that a layer's cache holds: of all layers, or [Z].
    step_T: the number of each token's step, ascending: tokens that are computed together share what is fetched. None:
      each is a step of its own.

  Returns:
    misses [Z], int64; where every token is a step, `valid_ZTK.sum((1, 2))` less these are the hits.
  """
  expert_ZTK, valid_ZTK = np.asarray(expert_ZTK), np.asarray(valid_ZTK)
  misses_Z = np.zeros(len(expert_ZTK), np.int64)
  length = expert_ZTK.shape[1]
  steps = np.split(np.arange(length), np.nonzero(np.diff(np.arange(length) if step_T is None else step_T))[0] + 1)
  for z, size in enumerate(np.broadcast_to(capacity, misses_Z.shape)):
    held: OrderedDict[int, None] = OrderedDict()
    for step in steps:
      taken = in_order_of_use(expert_ZTK[z, step], valid_ZTK[z, step])
      misses_Z[z] += sum(expert not in held for expert in taken)
      for expert in taken:
        held[expert] = None
        held.move_to_end(expert)
      while len(held) > size:
        held.popitem(last=False)
  return misses_Z


def report(config: Config, made: Plan, context: int, sequences: int) -> dict:
  """Returns a plan as a program's result: all of `Plan` in bytes, counts, and what a token moves."""
  resident_Z, weights = made.resident_ZE.sum(1), config.adapt.weights
  return {
    "program": "offload",
    "weights": config.model.dtype if weights == "float32" else weights,  # as they are held
    "memory_bytes": made.memory,
    "context": context,
    "sequences": sequences,
    "budget": made.budget,
    "weight_bytes": made.weights,
    "cache_bytes": made.cache,
    "reserve_bytes": made.reserve,
    "staging_bytes": made.staging,
    "resident_bytes": made.resident,
    "offloaded_bytes": made.offloaded,
    "expert_bytes": made.expert,
    "experts": made.resident_ZE.size,
    "experts_resident": int(resident_Z.sum()),
    "experts_resident_by_layer": resident_Z.tolist(),
    "missed_per_token": float(made.missed_Z.sum()),
    "taken_per_token": float(made.taken_ZE.sum()),
    "moved_bytes_per_token": made.moved_per_token,
  }


def table(result: dict) -> str:
  """Returns a `report` in lines for people; GB are 10^9 bytes."""
  rest = {family: size for family, size in result["weight_bytes"].items() if size and family != "experts"}
  held, whole = result["experts_resident"], result["experts"]
  resident_experts = held * result["expert_bytes"]
  rows = [
    ("memory", f"{_gb(result['memory_bytes'])} GB"),
    ("resident", f"{_gb(result['resident_bytes'])} GB"),
    *((f"  {family.replace('_', ' ')}", _size(size)) for family, size in rest.items()),
    (
      "  keys and values",
      f"{_size(result['cache_bytes'])}, sequences of {result['context']:,} tokens: {result['sequences']}",
    ),
    ("  reserve", f"{_size(result['reserve_bytes'])}, for activations and the program"),
    ("  staging", f"{_size(result['staging_bytes'])}, for experts on their way"),
    ("  experts", f"{_size(resident_experts)}, {held} of {whole} of {_size(result['expert_bytes'])} each"),
    ("offloaded", f"{_gb(result['offloaded_bytes'])} GB, {whole - held} experts in host memory"),
    ("a token takes", f"{result['taken_per_token']:.1f} experts, {result['budget']:g} a layer"),
    ("  misses", f"{result['missed_per_token']:.2f}"),
    ("  moves", f"{_size(result['moved_bytes_per_token'])}, without reuse between tokens"),
  ]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _gb(n: float) -> str:
  return f"{n / GB:,.2f}"


def _size(n: float) -> str:
  return f"{_gb(n)} GB" if n >= GB else f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"
