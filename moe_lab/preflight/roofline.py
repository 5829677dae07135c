"""How long a step takes at least: arithmetic, memory and network, each as if the others were free.

Assumptions. Arithmetic runs at the chip's peak, on `forward_flops_per_token` times three (a backward pass is two
products for each of the forward pass), four where the forward pass is run again (`model.remat = full`), with the mean
experts of the budget and the mean of min(window, position) keys. Frozen weights have one product in the backward pass;
the few that learn beside them are left out. Memory: each micro-batch reads a chip's weights in the activations' type,
or in 4 bits as they are, once forward and twice backward (once more with remat, once less if they are frozen), and a
step reads and writes what learns, its gradients and both moments in float32. Network: the compiled program's
collectives, with bytes as a ring sends them, over all links of a chip at once; what goes between slices comes on top,
over a chip's share of its host's network. The three overlap perfectly, so the step takes as long as the longest.
"""

import dataclasses

from moe_lab.config.schema import Config
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.nn.attention import layer_windows
from moe_lab.preflight.chips import Chip
from moe_lab.preflight.compile import Compiled
from moe_lab.preflight.hlo import BETWEEN, Collective
from moe_lab.preflight.serving import Serving


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step, by what they are spent on.

  Attributes:
    compute: arithmetic.
    memory: reading and writing.
    network: the collectives.
    flops_per_token: of training.
    model_flops_per_token: the same without what is computed again.
  """

  compute: float
  memory: float
  network: float
  flops_per_token: float
  model_flops_per_token: float

  @property
  def seconds(self) -> float:
    """Of a step."""
    return max(self.compute, self.memory, self.network)

  @property
  def binds(self) -> str:
    """What the step waits for: compute | memory | network."""
    return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

  @property
  def share(self) -> float:
    """Of the chips' peak: useful FLOPs over what they could have done in the step's time."""
    return self.compute / self.seconds * self.model_flops_per_token / self.flops_per_token


def mean_context(config: Config) -> float:
  """Returns how many keys a query sees, on average over positions and KV groups."""
  length, total = config.data.seq_len, 0.0
  for window in layer_windows(config.model):
    window = length if window is None else min(window, length)
    total += window - window * (window - 1) / (2 * length)  # the mean of min(position + 1, window)
  return total / config.model.num_kv_heads


def bytes_sent(collective: Collective, config: Config) -> float:
  """Returns what a chip sends by a collective in a step; of a ragged one, the rows of the mean count of experts."""
  ragged = collective.opcode == "ragged-all-to-all"
  return collective.bytes_per_chip * (config.routing.mean_count / config.routing.slots if ragged else 1.0)


def network_seconds(config: Config, collectives: list[Collective], chip: Chip) -> float:
  """Returns how long a chip sends in a step."""
  return sum(
    bytes_sent(c, config) / (chip.slice_bandwidth if c.opcode.endswith(BETWEEN) else chip.link_bandwidth)
    for c in collectives
  )


def roofline(config: Config, compiled: Compiled, chip: Chip, chips: int) -> Roofline:
  """Returns the least time of a compiled training step, under the assumptions above."""
  network = network_seconds(config, compiled.collectives, chip)
  held = compiled.parameter_bytes, compiled.optimizer_bytes
  return train_roofline(config, *held, config.mesh.fsdp, network, chip, chips)


def train_roofline(
  config: Config, parameter_bytes: float, optimizer_bytes: float, fsdp: int, network: float, chip: Chip, chips: int
) -> Roofline:
  """Returns the least time of a training step.

  Args:
    config: of the run.
    parameter_bytes: that a chip holds.
    optimizer_bytes: likewise.
    fsdp: chips that share a layer's weights.
    network: seconds that a chip sends in a step.
    chip: of the topology.
    chips: of them.
  """
  forward = forward_flops_per_token(config, config.routing.mean_count, mean_context(config))["total"]
  passes = 3 if config.adapt.learns == "all" else 2
  again = 1 if config.model.remat == "full" else 0
  tokens = config.train.batch_size * config.data.seq_len / chips
  gathered = parameter_bytes * fsdp  # of the layers, one after another
  if config.adapt.weights == "float32":
    gathered *= itemsize(config) / 4
  update = 4 * optimizer_bytes  # two moments, and as many bytes of parameters and gradients, each read and written
  return Roofline(
    compute=(passes + again) * forward * tokens / chip.flops,
    memory=((passes + again) * config.train.accumulate * gathered + update) / chip.memory_bandwidth,
    network=network,
    flops_per_token=(passes + again) * forward,
    model_flops_per_token=passes * forward,
  )


def serving_roofline(config: Config, compiled: Compiled, serving: Serving, chip: Chip, chips: int) -> Roofline:
  """Returns the least time of a step of decoding or of reading a chunk, with full caches.

  Arithmetic is that of the mean experts; logits are of each sequence's last token only. Memory: the dense weights are
  read once and of the experts those that some token takes, as if each took its own at random; with them the part of
  the cache that the sequences at hand have.
  """
  context = sum(min(window or serving.context, serving.context) for window in layer_windows(config.model))
  flops = forward_flops_per_token(config, config.routing.mean_count, context / config.model.num_kv_heads)
  tokens = serving.tokens
  forward = flops["total"] - flops["head"] * (1 - serving.rows / tokens)
  taken = 1 - (1 - config.routing.mean_count / config.model.num_experts) ** tokens
  read = compiled.parameter_bytes - compiled.expert_bytes * (1 - taken)
  read = read * config.mesh.fsdp + compiled.cache_bytes * serving.rows / serving.slots
  return Roofline(
    compute=forward * tokens / chips / chip.flops,
    memory=read / chip.memory_bandwidth,
    network=network_seconds(config, compiled.collectives, chip),
    flops_per_token=forward,
    model_flops_per_token=forward,
  )


def itemsize(config: Config) -> int:
  """Returns the bytes of a number of the activations' type."""
  return 2 if config.model.dtype == "bfloat16" else 4
