"""The whole configuration of a run, as frozen dataclasses.

No jax here, and no ConfigDict beyond `resolve.py`: library code receives these
classes, already checked. Field comments are the reference for users.
"""

import dataclasses

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.checks import check_choice, check_range
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.routing import RoutingConfig
from moe_lab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shapes of the decoder. Letters as in `moe_lab/types.py`."""

  dim: int = 128  # D
  num_layers: int = 4  # Z, dense ones included
  num_dense_layers: int = 0  # of these, how many (from the bottom) have a dense MLP; all of them: no experts at all
  num_heads: int = 4  # N
  num_kv_heads: int = 2  # M; must divide num_heads
  head_dim: int = 32  # H
  num_experts: int = 16  # E
  expert_dim: int = 128  # F, hidden width of one expert
  num_shared_experts: int = 0  # experts of width F that every token takes (DeepSeekMoE, arXiv 2401.06066)
  shared_dim: int = 0  # instead: the joint width of what every token takes, where it is no multiple of F
  shared_gate: bool = False  # its output is weighted by a sigmoid of the token (Qwen1.5-MoE)
  dense_dim: int = 512  # hidden width of the dense layers' MLP
  position: str = "alibi"  # alibi (slopes per KV group) | rotary
  num_global_groups: int = 1  # with alibi: how many KV groups have slope 0 and see everything
  rotary_base: float = 10_000.0
  # (factor, low, high, length): rotary wavelengths above length / low become so many times longer, those below
  # length / high stay, between the two it blends (Llama 3.1, arXiv 2407.21783); () is off.
  rotary_stretch: tuple[float, ...] = ()
  # Distances count as so many times shorter, so that a longer context looks as long as the trained one did: slopes and
  # rotary positions are divided by it, and windows grow with it (position interpolation, arXiv 2306.15595).
  position_interpolation: float = 1.0
  # From so many tokens on, logits of groups without a slope grow by the logarithm of the position, or their softmax
  # thins out over more keys than were trained with (scalable softmax, arXiv 2501.19399, after training). 0: never.
  sharpen_from: int = 0
  qk_norm: bool = True  # RMS-normalise queries and keys
  qk_norm_over: str = "head"  # head | all (a token's heads together: OLMoE; only with qk_bound 0)
  qk_bound: float = 8.0  # S: with qk_norm, |q.k| / sqrt(H) never exceeds this; 0: no bound, and so no windows
  qkv_bias: bool = False  # of the projections to queries, keys and values
  norm_epsilon: float = 1e-6  # added to the mean square that an RMSNorm divides by
  tie_embeddings: bool = False
  scale_embeddings: bool = True  # input embeddings are multiplied by sqrt(D)
  dtype: str = "float32"  # of activations: float32 | bfloat16; parameters stay float32
  # auto | reference | blocked (XLA) | native (CPU kernel, built at first use) | tpu (kernel) | flash (kernel,
  # GPU in bfloat16)
  attention_backend: str = "auto"
  attention_block: int = 0  # rows of a block of the blocked back end; 0: what suits the device
  dispatch: str = "auto"  # auto | dense | capacity | ragged
  # Of ragged dispatch: auto (native on CPU where it can be built, tokamax on GPU where installed, ragged_dot on TPU) |
  # native (CPU kernel) | tiles (loops of XLA, CPU and GPU) | ragged_dot (XLA) | tokamax (kernels, GPU and TPU)
  grouped_matmul: str = "auto"
  capacity_factor: float = 1.25  # rows per expert over the mean load; capacity dispatch only
  remat: str = "none"  # what a layer's backward pass computes again: none | dots (all but matrix products) | full

  def __post_init__(self):
    for name in (
      "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "num_experts", "expert_dim", "dense_dim",
    ):  # fmt: skip
      check_range(f"model.{name}", getattr(self, name), 1)
    check_range("model.attention_block", self.attention_block, 0)
    check_range("model.num_dense_layers", self.num_dense_layers, 0, self.num_layers)
    check_range("model.num_shared_experts", self.num_shared_experts, 0)
    check_range("model.shared_dim", self.shared_dim, 0, 0 if self.num_shared_experts else float("inf"))
    if self.num_heads % self.num_kv_heads:
      raise ConfigError("model.num_kv_heads", self.num_kv_heads, f"a divisor of model.num_heads = {self.num_heads}")
    check_choice("model.position", self.position, ("alibi", "rotary"))
    if self.position == "rotary" and self.head_dim % 2:
      raise ConfigError("model.head_dim", self.head_dim, "an even number, since model.position is rotary")
    check_range("model.num_global_groups", self.num_global_groups, 0, self.num_kv_heads)
    check_range("model.rotary_base", self.rotary_base, 1, open_low=True)
    if self.rotary_stretch:
      self._check_rotary_stretch()
    check_range("model.position_interpolation", self.position_interpolation, 0, open_low=True)
    if self.sharpen_from:
      check_range("model.sharpen_from", self.sharpen_from, 2)
    check_choice("model.qk_norm_over", self.qk_norm_over, ("head", "all"))
    check_range("model.qk_bound", self.qk_bound, 0, 0 if self.qk_norm_over == "all" else float("inf"))
    check_range("model.norm_epsilon", self.norm_epsilon, 0, 1)
    check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
    backends = ("auto", "reference", "blocked", "native", "tpu", "flash")
    check_choice("model.attention_backend", self.attention_backend, backends)
    check_choice("model.dispatch", self.dispatch, ("auto", "dense", "capacity", "ragged"))
    check_range("model.capacity_factor", self.capacity_factor, 0, open_low=True)
    check_choice("model.grouped_matmul", self.grouped_matmul, ("auto", "native", "tiles", "ragged_dot", "tokamax"))
    check_choice("model.remat", self.remat, ("none", "dots", "full"))

  def _check_rotary_stretch(self) -> None:
    if len(self.rotary_stretch) != 4 or not 0 < self.rotary_stretch[1] < self.rotary_stretch[2]:
      raise ConfigError("model.rotary_stretch", self.rotary_stretch, "(factor, low, high, length), low < high; or ()")
    for value in self.rotary_stretch:
      check_range("model.rotary_stretch", value, 0, open_low=True)

  @property
  def routed_layers(self) -> int:
    """Layers that there are statistics and a router's state of; one, which takes no expert, if all are dense."""
    return max(self.num_layers - self.num_dense_layers, 1)

  @property
  def shared_width(self) -> int:
    """Hidden width of the MLP that every token takes beside its experts; 0: none."""
    return self.shared_dim or self.num_shared_experts * self.expert_dim


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What the model reads.

  A source is `stdlib` (the Python standard library's source and docs), `package:NAME` (the text files of an installed
  package), `text:PATH`, `jsonl:PATH` (a "text" field a line), `chat:PATH` (JSON lines of "messages", of which only the
  answers count), `array_record:PATH`, or `synthetic:TASK`, which does not mix with text. PATH is a file, a folder or a
  glob.
  """

  sources: tuple[str, ...] = ("stdlib",)
  weights: tuple[float, ...] = ()  # mixing weights, one a source; empty: by number of documents
  vocab_size: int = 2048  # V
  tokenizer: str = ""  # a sentencepiece .model file, or a .json; empty: train one on the training split, cached
  seq_len: int = 256  # L
  validation_share: float = 0.05  # of the documents, chosen by a hash of their text
  test_share: float = 0.05
  seed: int = 0  # of shuffling

  def __post_init__(self):
    if not self.sources:
      raise ConfigError("data.sources", self.sources, "at least one source")
    kinds = ("stdlib", "package", "text", "jsonl", "chat", "array_record", "synthetic")
    for source in self.sources:
      kind, _, path = source.partition(":")
      check_choice("data.sources", kind, kinds)
      if (kind != "stdlib") != bool(path):
        raise ConfigError("data.sources", source, "'stdlib', or 'KIND:PATH' with KIND one of " + ", ".join(kinds[1:]))
    if any(s.startswith("synthetic:") for s in self.sources) and len(self.sources) > 1:
      raise ConfigError("data.sources", self.sources, "a synthetic task alone: it has its own vocabulary")
    if self.weights and len(self.weights) != len(self.sources):
      raise ConfigError("data.weights", self.weights, f"one weight a source ({len(self.sources)}), or none")
    for weight in self.weights:
      check_range("data.weights", weight, 0, open_low=True)
    check_range("data.vocab_size", self.vocab_size, 8)
    check_range("data.seq_len", self.seq_len, 2)
    check_range("data.validation_share", self.validation_share, 0, 0.5, open_low=True)
    check_range("data.test_share", self.test_share, 0, 0.5, open_low=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long and how fast to learn, and what to keep."""

  steps: int = 1000
  batch_size: int = 16  # B, sequences per step
  accumulate: int = 1  # gradients of this many micro-batches are averaged into a step; must divide batch_size
  learning_rate: float = 2e-3
  warmup_steps: int = 50
  decay: str = "cosine"  # cosine | linear | constant
  final_lr_share: float = 0.1  # of learning_rate, at the end of the decay
  weight_decay: float = 0.1  # on matrices
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0  # of the gradient, globally
  seed: int = 0  # of parameters, sampled counts and dropout
  log_every: int = 10
  eval_every: int = 200
  eval_batches: int = 8  # of validation, at each evaluation while training
  checkpoint_every: int = 200
  keep_checkpoints: int = 2
  max_skipped: int = 10  # updates in a row with gradients that are not finite, or spike, before the run stops
  spike_factor: float = 0.0  # a gradient so many times as long as usual is a spike, and skipped; 0: none is

  def __post_init__(self):
    for name in (
      "steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_batches", "checkpoint_every",
      "keep_checkpoints", "max_skipped",
    ):  # fmt: skip
      check_range(f"train.{name}", getattr(self, name), 1)
    if self.batch_size % self.accumulate:
      raise ConfigError("train.accumulate", self.accumulate, f"a divisor of train.batch_size = {self.batch_size}")
    check_range("train.learning_rate", self.learning_rate, 0, open_low=True)
    check_range("train.warmup_steps", self.warmup_steps, 0)
    check_choice("train.decay", self.decay, ("cosine", "linear", "constant"))
    check_range("train.final_lr_share", self.final_lr_share, 0, 1)
    check_range("train.weight_decay", self.weight_decay, 0)
    check_range("train.beta1", self.beta1, 0, 0.9999)
    check_range("train.beta2", self.beta2, 0, 0.99999)
    check_range("train.clip_norm", self.clip_norm, 0, open_low=True)
    if self.spike_factor:
      check_range("train.spike_factor", self.spike_factor, 1, open_low=True)


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  model: ModelConfig = ModelConfig()
  routing: RoutingConfig = RoutingConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  adapt: AdaptConfig = AdaptConfig()

  def with_seed(self, seed: int) -> "Config":
    """Returns the same run with another seed: of parameters and draws, and of the data's order."""
    train, data = dataclasses.replace(self.train, seed=seed), dataclasses.replace(self.data, seed=seed)
    return dataclasses.replace(self, train=train, data=data)

  def __post_init__(self):
    slots_field = "routing.k" if self.routing.fixed else "routing.k_max"
    if self.routing.slots > self.model.num_experts:
      raise ConfigError(slots_field, self.routing.slots, f"at most model.num_experts = {self.model.num_experts}")
    if self.model.num_dense_layers == self.model.num_layers and not self.routing.fixed:
      raise ConfigError("routing.method", self.routing.method, "topk, since all of model.num_layers are dense")
    if self.routing.expert_dropout > 0:
      left = int(self.model.num_experts * (1 - self.routing.expert_dropout))
      if left < self.routing.slots:
        raise ConfigError(
          "routing.expert_dropout",
          self.routing.expert_dropout,
          f"a share that leaves {slots_field} = {self.routing.slots} of {self.model.num_experts} experts",
        )
    groups = self.routing.expert_groups
    if groups > 1:
      if self.model.num_experts % groups:
        wanted = f"a divisor of model.num_experts = {self.model.num_experts}"
        raise ConfigError("routing.expert_groups", groups, wanted)
      if self.model.num_experts // groups * self.routing.groups_kept < self.routing.slots:
        wanted = f"groups that hold at least {slots_field} = {self.routing.slots} experts together"
        raise ConfigError("routing.groups_kept", self.routing.groups_kept, wanted)
      if self.routing.expert_dropout > 0:
        # Dropped experts could leave a token's groups with too few.
        raise ConfigError("routing.expert_dropout", self.routing.expert_dropout, "0 with routing.expert_groups")
    if self.routing.freezes_model and self.adapt.learns == "adapters":  # it trains nothing but its own heads
      raise ConfigError("routing.learner", self.routing.learner, "another learner, since adapters are to learn")
    if self.routing.freezes_model and self.train.accumulate > 1:
      raise ConfigError("train.accumulate", self.train.accumulate, "1, since routing.learner is ppo")
    if self.routing.two_rollouts:
      rows = self.train.batch_size // self.train.accumulate
      if round(rows * self.routing.second_rollouts) < 1:
        wanted = f"at least one sequence of the {rows} in a micro-batch (>= {1 / rows:.3g})"
        raise ConfigError("routing.second_rollouts", self.routing.second_rollouts, wanted)
    self._check_mesh()

  def _check_mesh(self) -> None:
    """Raises ConfigError where a mesh axis does not divide what it spreads."""
    spread = {
      "fsdp": {"model.dim": self.model.dim},
      "expert": {"model.num_experts": self.model.num_experts},
      "sequence": {"data.seq_len": self.data.seq_len},
      "model": {
        "model.num_kv_heads": self.model.num_kv_heads,
        "model.expert_dim": self.model.expert_dim,
        "data.vocab_size": self.data.vocab_size,
      },
    }
    if self.model.num_dense_layers:
      spread["model"]["model.dense_dim"] = self.model.dense_dim
    for axis, sizes in spread.items():
      devices = getattr(self.mesh, axis)
      for field, size in sizes.items():
        if size % devices:
          raise ConfigError(f"mesh.{axis}", devices, f"a divisor of {field} = {size}")
