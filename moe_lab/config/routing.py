"""Which experts a token gets: the fields of every routing method."""

import dataclasses

from moe_lab.config.checks import check_choice, check_range
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
