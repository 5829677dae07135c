"""The whole configuration of a run, as frozen dataclasses.

No jax here, and no ConfigDict beyond `resolve.py`: library code receives these
classes, already checked. Field comments are the reference for users.
"""

import dataclasses

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.checks import check_choice, check_range
from moe_lab.config.mesh import MeshConfig
from moe_lab.errors import ConfigError

METHODS = (
  "dynamic", "topk", "random_k", "top_p", "top_p_pi", "null_experts", "learned_threshold", "relu", "expert_threshold",
  "entropy_rule", "expert_choice", "sequence_topk",
)  # fmt: skip
_TWO_ROLLOUTS = ("leave_one_out", "greedy")  # baselines that are a second rollout
_MAY_TAKE_NONE = ("null_experts", "relu", "expert_threshold", "expert_choice", "sequence_topk")
# Methods whose gates are a choice; the others' are part of them.
_SLOT_GATES = ("dynamic", "topk", "random_k", "entropy_rule", "sequence_topk")
_GATES = ("softmax_chosen", "softmax_all", "softmax_unit", "softmax_kept", "sigmoid")
# Methods that can be trained for a range of budgets.
_ANY_BUDGET = (
  "dynamic", "random_k", "top_p_pi", "null_experts", "learned_threshold", "entropy_rule", "sequence_topk",
)  # fmt: skip


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
class RoutingConfig:
  """Which experts a token gets, and how many."""

  method: str = "dynamic"  # dynamic (a learned count policy) | topk (always k) | others: README, "Routing methods"
  k: int = 2  # topk: experts per token
  k_min: int = 1  # all others: the fewest (0 where the method can do without an expert) ...
  k_max: int = 8  # ... and the most experts of a token
  budget: float = 2.0  # all others: mean experts per token and layer
  budget_range: tuple[float, ...] = ()  # (low, high): training asks each sequence for a budget of its own; () is off
  budget_mode: str = "exactly"  # exactly | at_most (an upper bound; spends less where experts buy nothing)
  policy_input: str = "hidden"  # what the count policy reads: hidden | token (the token's embedding only: a control)
  # How the count policy learns. By REINFORCE, with the baseline leave_one_out (two rollouts) | greedy (the second
  # rollout takes the greedy counts) | value (a value head, one rollout) | none; by ppo (a value head; after the warm-up
  # the model is frozen and each rollout serves several updates); by straight_through (no sampled reward: a gradient
  # through relaxed counts); or by values: curvature (an expert's worth, from its gate's slope).
  learner: str = "curvature"
  second_rollouts: float = 0.25  # leave_one_out, greedy: share of a batch's sequences that is rolled out twice
  warmup_steps: int = 200  # steps with counts drawn at random before the policy learns
  entropy_floor: float = 0.6  # share of the untrained policy's entropy that the policy's mean entropy is kept above
  credit_discount: float = 0.5  # share of the next token's loss that is credited one token back
  lambda_min: float = 0.002  # at_most: the least price of an expert, in nats per expert
  # Where the method leaves a choice: softmax_chosen | softmax_all (Switch) | softmax_unit (of length one) | sigmoid |
  # softmax_kept (as long as softmax_chosen with all k_max: for models trained with so many) |
  # auto, what did best: softmax_chosen for fixed k, softmax_unit where the count varies, softmax_all below 1.5 experts.
  gate: str = "auto"
  # There too: router logits are standardised over the experts, times a learned factor (DTop-p, arXiv 2512.13996).
  standardise: bool = True
  expert_groups: int = 1  # groups that the experts are divided into (group-limited routing) ...
  groups_kept: int = 1  # ... and how many of them, the best ones, are open to a token
  count_shares: tuple[float, ...] = ()  # random_k: chance of each count k_min..k_max; (): most entropy with that mean
  top_p: float = 0.4  # top_p: probability that a token's experts reach together
  entropy_loss_weight: float = 1e-4  # top_p: of the router's entropy
  num_null_experts: int = 16  # null_experts: beside the real ones
  null_output: str = "zero"  # null_experts: what they give: zero (AdaMoE) | identity (LongCat-Flash, MoE++)
  load_balance_weight: float = 0.01
  balance_scope: str = "local"  # what is to be even: local (each micro-batch) | sequence | global (a step's batch)
  z_loss_weight: float = 0.001
  bias_update_rate: float = 0.0  # loss-free balancing (arXiv 2408.15664); 0 is off
  router_jitter: float = 0.0  # in training the router's input is multiplied by a random 1 +- this (arXiv 2101.03961)
  gating_dropout: float = 0.0  # share of steps in which a layer's tokens go to random experts (arXiv 2205.14336)
  expert_dropout: float = 0.0  # mean share of experts that leave the choice in a training step; the busier the likelier

  def __post_init__(self):
    check_choice("routing.method", self.method, METHODS)
    check_range("routing.k", self.k, 1)
    # Some published methods let a token have no expert at all.
    check_range("routing.k_min", self.k_min, 0 if self.method in _MAY_TAKE_NONE else 1)
    check_range("routing.k_max", self.k_max, max(self.k_min, 1))
    check_range("routing.budget", self.budget, self.k_min, self.k_max, open_low=self.k_min == 0)
    check_choice("routing.budget_mode", self.budget_mode, ("exactly", "at_most"))
    check_choice("routing.policy_input", self.policy_input, ("hidden", "token"))
    learners = (*_TWO_ROLLOUTS, "value", "none", "ppo", "straight_through", "curvature")
    check_choice("routing.learner", self.learner, learners)
    check_range("routing.second_rollouts", self.second_rollouts, 0, 1, open_low=self.learner in _TWO_ROLLOUTS)
    check_range("routing.warmup_steps", self.warmup_steps, 0)
    check_choice("routing.gate", self.gate, ("auto", *_GATES))
    if self.method not in _SLOT_GATES and self.gate != "auto":
      raise ConfigError("routing.gate", self.gate, f"auto: the method {self.method} has gates of its own")
    check_range("routing.expert_groups", self.expert_groups, 1)
    check_range("routing.groups_kept", self.groups_kept, 1, self.expert_groups)
    self._check_budget_range()
    self._check_count_shares()
    check_range("routing.top_p", self.top_p, 0, 1, open_low=True)
    check_range("routing.num_null_experts", self.num_null_experts, 1)
    if self.method == "null_experts":
      least = self.k_max - int(min((self.budget, *self.budget_range)))
      if self.num_null_experts < least:
        wanted = f"at least {least}, or k_max = {self.k_max} slots cannot be left to so few real experts"
        raise ConfigError("routing.num_null_experts", self.num_null_experts, wanted)
    check_choice("routing.null_output", self.null_output, ("zero", "identity"))
    check_choice("routing.balance_scope", self.balance_scope, ("local", "sequence", "global"))
    for name in ("entropy_loss_weight", "lambda_min", "load_balance_weight", "z_loss_weight", "bias_update_rate"):
      check_range(f"routing.{name}", getattr(self, name), 0)
    check_range("routing.entropy_floor", self.entropy_floor, 0, 0.95)
    check_range("routing.credit_discount", self.credit_discount, 0, 0.99)
    check_range("routing.router_jitter", self.router_jitter, 0, 0.9)
    check_range("routing.gating_dropout", self.gating_dropout, 0, 0.9)
    check_range("routing.expert_dropout", self.expert_dropout, 0, 0.5)

  def _check_budget_range(self) -> None:
    if not self.budget_range:
      return
    if self.method not in _ANY_BUDGET:
      raise ConfigError("routing.budget_range", self.budget_range, f"(): the method {self.method} has one budget")
    if len(self.budget_range) != 2:
      raise ConfigError("routing.budget_range", self.budget_range, "two budgets, the lowest and the highest; or ()")
    low, high = self.budget_range
    check_range("routing.budget_range", low, max(self.k_min, 0.1), self.k_max)
    check_range("routing.budget_range", high, low, self.k_max, open_low=True)
    if not low <= self.budget <= high:
      raise ConfigError("routing.budget", self.budget, f"a budget within routing.budget_range = {self.budget_range}")

  def _check_count_shares(self) -> None:
    if not self.count_shares:
      return
    if self.method != "random_k" or self.budget_range:
      raise ConfigError("routing.count_shares", self.count_shares, "(), unless the method is random_k at one budget")
    for share in self.count_shares:
      check_range("routing.count_shares", share, 0)
    if len(self.count_shares) != self.k_max - self.k_min + 1 or sum(self.count_shares) <= 0:
      wanted = f"one share for each count from k_min = {self.k_min} to k_max = {self.k_max}"
      raise ConfigError("routing.count_shares", self.count_shares, wanted)
    mean = sum((self.k_min + i) * share for i, share in enumerate(self.count_shares)) / sum(self.count_shares)
    if abs(mean - self.budget) > 0.01:
      raise ConfigError("routing.budget", self.budget, f"{mean:.4g}, the mean of routing.count_shares")

  @property
  def fixed(self) -> bool:
    """Whether every token takes exactly k; all other methods aim at the budget."""
    return self.method == "topk"

  @property
  def slot_gate(self) -> str:
    """How a token's gates follow from its logits, where `gate` may be auto."""
    if self.gate != "auto":
      return self.gate
    # One expert's gate over itself is the constant one, through which the router learns nothing.
    if self.mean_count < 1.5:
      return "softmax_all"
    return "softmax_chosen" if self.fixed else "softmax_unit"

  @property
  def standardised(self) -> bool:
    """Whether router logits are standardised; methods with gates of their own have logits of their own."""
    return self.standardise and self.method in _SLOT_GATES

  @property
  def learns_counts(self) -> bool:
    """Whether the count is a policy with a learner and a price."""
    return self.method == "dynamic"

  @property
  def two_rollouts(self) -> bool:
    """Whether some sequences run twice in a batch."""
    return self.learns_counts and self.learner in _TWO_ROLLOUTS

  @property
  def freezes_model(self) -> bool:
    """Whether after the warm-up only the count policy learns."""
    return self.learns_counts and self.learner == "ppo"

  @property
  def slots(self) -> int:
    """K, the expert slots that a token's assignment holds."""
    return self.k if self.fixed else self.k_max

  @property
  def mean_count(self) -> float:
    """Experts per token that are asked for."""
    return float(self.k) if self.fixed else self.budget

  @property
  def budgets(self) -> tuple[float, float]:
    """The lowest and the highest budget that a trained model can be asked for."""
    if self.fixed:
      return float(self.k), float(self.k)
    if self.budget_range:
      return self.budget_range
    # A prior or a total follows any budget; a threshold was steered to one.
    if self.learns_counts and self.learner == "curvature":  # its price was found for one
      return self.budget, self.budget
    if self.learns_counts or self.method in ("sequence_topk", "expert_choice"):
      return float(max(self.k_min, 1)), float(self.k_max)
    if self.method == "random_k" and not self.count_shares:
      return float(self.k_min), float(self.k_max)
    return self.budget, self.budget

  @property
  def target(self) -> float:
    """The mean count that controllers aim at: the budget, or a little under it where it must not be exceeded."""
    return self.budget if self.budget_mode == "exactly" else max(0.98 * self.budget, float(self.k_min))


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
  max_skipped: int = 10  # updates in a row with gradients that are not finite before the run stops

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
