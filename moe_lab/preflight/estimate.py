"""What a mesh would cost, by arithmetic alone: good enough to rank meshes, not to say that one fits.

Bytes a chip holds: parameters, of those that learn two moments and gradients in float32 (these twice where
micro-batches are added up), each layer's input, one layer's and the head's gathered weights, and the rows of one
layer's experts, whose buffers have room for the worst case; of these about four as wide as the model and five as wide
as an expert live at a time. Bytes a chip sends: weights fetched along "fsdp" forward and backward (those in 4 bits as
they are), the gradients of those that learn in float32, the experts' rows there and back in three passes, sums along
"model", and keys where a sequence lies on several chips. Against the compiler's plan for the presets
(benchmarks/results, `presets` of 2026-11-26) memory comes out between 4% too high and a fifth too low, lowest for wide
experts, and the network of medium_50b within 3%.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from moe_lab.adapt.learning import learns
from moe_lab.config.schema import Config
from moe_lab.nn.attention import layer_windows
from moe_lab.preflight.chips import Chip
from moe_lab.preflight.roofline import Roofline, itemsize, train_roofline
from moe_lab.sharding.rules import AXES, BATCH, num_along, parameter_spec, token_spec
from moe_lab.train.state import abstract_state

MODEL_BUFFERS, EXPERT_BUFFERS = 4, 5  # of rows, alive at a time
FETCHES = 2  # of a layer's weights in a micro-batch: forward and backward
PASSES = 3  # of activations: forward, again in the backward pass, and backward


@dataclasses.dataclass(frozen=True)
class Weights:
  """A parameter as the arithmetic needs it.

  Attributes:
    size: numbers; of a weight in 4 bits its bytes.
    spec: along which axis each dimension is spread.
    itemsize: bytes of a number as it is held.
    learns: whether it has a gradient and moments.
  """

  size: int
  spec: tuple[str | None, ...]
  itemsize: int
  learns: bool

  @property
  def of_experts(self) -> bool:
    """Whether it is spread over "expert"."""
    return "expert" in self.spec

  def part(self, sizes: Mapping[str, int], *but: str) -> float:
    """Returns how many numbers a chip has of it, if it were not spread over the axes `but`."""
    return self.size / math.prod(sizes[axis] for axis in self.spec if axis and axis not in but)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes that a chip holds, and the roofline of a step."""

  bytes_per_chip: float
  roofline: Roofline


def weights_of(config: Config) -> list[Weights]:
  """Returns the parameters of a model."""
  params = abstract_state(config).params
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return [
    Weights(
      math.prod(leaf.shape),
      tuple(parameter_spec(path[-1].key, leaf.ndim)),
      leaf.dtype.itemsize,
      learns(path[-1].key, config.adapt),
    )
    for path, leaf in leaves
  ]


def spreads_tokens(config: Config, sizes: Mapping[str, int]) -> bool:
  """Returns whether a micro-batch's tokens can be spread over such a mesh.

  Stretches of several sequences on all chips can, but not well: the partitioner moves whole activations in every layer
  (medium_50b on 256 chips with eight sequences of 128K: 6.1 s on the network, and 2.1 s with one at a time).
  """
  mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  rows = config.train.batch_size // config.train.accumulate
  spec = token_spec(mesh, rows, config.data.seq_len)
  return mesh.size == 1 or (spec != P() and (rows == 1 or spec[0] is not None))


def estimate(config: Config, weights: list[Weights], sizes: Mapping[str, int], chip: Chip) -> Estimate:
  """Returns what a training step would cost.

  Args:
    config: of the run; its mesh is not looked at.
    weights: `weights_of(config)`.
    sizes: axis -> chips along it.
    chip: of the topology.
  """
  model, train = config.model, config.train
  mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  each = itemsize(config)  # bytes of an activation
  tokens = train.batch_size // train.accumulate * config.data.seq_len * sizes["model"] / mesh.size  # of a chip
  experts = [w for w in weights if w.of_experts]
  learning = [w for w in weights if w.learns]
  held = sum(w.itemsize * w.part(sizes) for w in weights)
  moments = 2 * 4 * sum(w.part(sizes) for w in learning)

  rows = tokens * config.routing.slots * sizes["expert"]
  widths = MODEL_BUFFERS * model.dim + EXPERT_BUFFERS * model.expert_dim / sizes["model"]
  saved = 1 if model.remat == "full" else model.num_layers

  def gathered(some, *but):
    """Returns the bytes of weights in the type that they are multiplied in, as `Weights.part`."""
    return sum(min(w.itemsize, each) * w.part(sizes, *but) for w in some)

  layer = gathered(experts, "fsdp") / model.num_layers + 2 * each * config.data.vocab_size * model.dim
  gradients = moments / 2 * (2 if train.accumulate > 1 else 1)
  memory = held + moments + gradients + 2 * layer
  memory += each * (model.num_layers * tokens * model.dim + saved * rows * widths)

  fetched = FETCHES * gathered([w for w in weights if "fsdp" in w.spec], "fsdp")
  scattered = 4 * sum(w.part(sizes, "fsdp") for w in learning if "fsdp" in w.spec)  # gradients, in float32
  sent = (fetched + scattered) * _others(sizes["fsdp"])
  sent += 8 * sum(w.part(sizes) for w in learning if w.of_experts) * _others(sizes["data"] * sizes["sequence"])
  rest = [w for w in learning if not w.of_experts]
  readers, stretched = token_spec(mesh, train.batch_size // train.accumulate, config.data.seq_len) or (BATCH, None)
  stretches = num_along(mesh, stretched)
  if readers:
    copies = sizes["data"] * sizes["expert"] * sizes["sequence"]
    sent += 8 * sum(w.part(sizes) for w in rest) * _others(copies)
  else:  # of one sequence at a time, the partitioner sums whole gradients over all chips
    sent += 8 * sum(w.part(sizes, "fsdp") for w in rest) * _others(mesh.size // sizes["model"])
  layers = model.num_layers
  there = tokens * config.routing.mean_count * model.dim * each * _others(sizes["expert"])
  sent += layers * 2 * PASSES * there
  sent += layers * 2 * PASSES * 2 * tokens * model.dim * each * _others(sizes["model"])
  seen = sum(window is None for window in layer_windows(model)) / sizes["model"]  # groups that see everything
  keys = 2 * seen * model.head_dim * tokens * stretches  # and values; gathered twice, gradients scattered in float32
  sent += layers * keys * (2 * each + 4) * _others(stretches)
  network = train.accumulate * sent / chip.link_bandwidth
  return Estimate(memory, train_roofline(config, held, moments, sizes["fsdp"], network, chip, mesh.size))


def _others(devices: int) -> float:
  """Returns the share of the data that a ring of devices sends on."""
  return (devices - 1) / devices
