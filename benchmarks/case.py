"""What is measured: one model shape, one way of routing."""

import dataclasses

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Case:
  """A decoder that both sides can build: rotary positions, no QK-norm, untied head, every layer a mixture.

  Attributes:
    method: topk | dynamic (one rollout, value head) | dynamic_rollouts (a quarter of the sequences rolled out twice) |
      overflow (dynamic, with every token on the same `k_max` experts; `moe_layer` only).
    k: experts per token; the mean of a dynamic method, whose most is `k_max`.
    sequences: decoded together; `decode` only.
    others: letters as in `moe_lab/types.py`.
  """

  method: str = "topk"
  k: float = 2
  k_max: int = 8
  num_experts: int = 16
  expert_dim: int = 512
  vocab_size: int = 8192
  dim: int = 256
  num_layers: int = 4
  num_heads: int = 8
  head_dim: int = 32
  batch_size: int = 8
  seq_len: int = 512
  sequences: int = 0
  dtype: str = "float32"

  @property
  def name(self) -> str:
    """As in "topk k=2, 16 experts of 512", and of `decode` ", batch 8"."""
    batch = f", batch {self.sequences}" if self.sequences else ""
    return f"{self.method} k={self.k:g}, {self.num_experts} experts of {self.expert_dim}{batch}"

  def config(self) -> Config:
    """Returns the run's configuration of this case."""
    if self.method == "topk":
      routing = RoutingConfig(method="topk", k=int(self.k))
    else:
      learner = "leave_one_out" if self.method == "dynamic_rollouts" else "value"
      routing = RoutingConfig(method="dynamic", budget=self.k, k_max=self.k_max, learner=learner)
    model = ModelConfig(
      dim=self.dim,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_heads,
      head_dim=self.head_dim,
      num_experts=self.num_experts,
      expert_dim=self.expert_dim,
      position="rotary",
      num_global_groups=0,
      qk_norm=False,
      dtype=self.dtype,
    )
    data = DataConfig(vocab_size=self.vocab_size, seq_len=self.seq_len)
    return Config(model, routing, data, TrainConfig(batch_size=self.batch_size))


PROMPT, NEW = 128, 64  # tokens read and tokens generated for each sequence of the decode benchmark
SEQUENCES = (1, 8)  # that it decodes together
MIXED = {"method": "dynamic", "k": 2, "k_max": 8}  # the routing under which its easy and hard sequences are mixed
HARD = (1, 0, 2, 1, 0, 1, 3, 1)  # of eight, run after run: at 8 experts beside 1 they ask for 2 on average
BATCHES = 500  # that a run of the data benchmark reads: several windows of shuffling

PRESETS = {
  "cpu": Case(),
  "gpu": Case(
    k=8,
    num_experts=64,
    expert_dim=1024,
    vocab_size=32_768,
    dim=2048,
    num_heads=16,
    head_dim=128,
    batch_size=4,
    seq_len=4096,
    dtype="bfloat16",
  ),
}
