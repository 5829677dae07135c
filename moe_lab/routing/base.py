"""What a router takes and returns.

A router (`router.py`) is a pure function of its parameters, the hidden states
and a context. It returns an `Assignment`, which says where the tokens go, and
`RouterStats`, from which every auxiliary loss, controller and report is
computed. Statistics are returned, never sown, so none can be lost on the way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Assignment(NamedTuple):
  """Up to K experts per token; `valid_TK` keeps shapes static under a dynamic count.

  Attributes:
    expert_TK: int32, best expert first.
    gate_TK: float32, 0 in slots that are not valid.
    valid_TK: bool; a token's valid slots come first. Padding has none.
    identity_T: float32, gate of the token's own input, which experts that compute nothing give back; None: no such.
  """

  expert_TK: jax.Array
  gate_TK: jax.Array
  valid_TK: jax.Array
  identity_T: jax.Array | None = None


class PolicyTerms(NamedTuple):
  """What a count policy leaves for its learner, per token.

  Attributes:
    log_prob_T: float32, of the count that was taken.
    expected_count_T: float32, mean of the policy, in experts.
    entropy_T: float32, of the policy, in nats.
    greedy_count_T: float32, what the inference rule would have taken.
    value_T: float32, the value head's prediction of the credited loss in nats; None without one.
  """

  log_prob_T: jax.Array
  expected_count_T: jax.Array
  entropy_T: jax.Array
  greedy_count_T: jax.Array
  value_T: jax.Array | None


class Choice(NamedTuple):
  """What a layer's router made of each token, to compare two models' routing by; nothing is summed.

  Attributes:
    logits_TE: float32.
    expert_TK: int32.
    valid_TK: bool, slots in use.
  """

  logits_TE: jax.Array
  expert_TK: jax.Array
  valid_TK: jax.Array


class RouterStats(NamedTuple):
  """Sums over the real (unpadded) tokens of one layer, float32; scan stacks them to [Z, ...].

  Attributes:
    token_count: [], tokens summed over.
    assigned_E: [E], rows sent to each expert.
    prob_sum_E: [E], router probabilities.
    z_sum: [], squared log-normaliser of the router logits.
    entropy_sum: [], entropy of the router probabilities, in nats.
    count_histogram_K1: [K + 1], tokens by number of experts.
    dropped_sum: [], rows lost for want of capacity.
    count_T: int32 [T], experts of each token.
    policy: terms of a learned count policy; None for a router without one.
    sums: the method's own sums over tokens by name, for its losses and its state.
    sequences: the balance loss's sums for each sequence; None where it does not go by sequence.
    choice: of each token; None where the model is not asked for it.
  """

  token_count: jax.Array
  assigned_E: jax.Array
  prob_sum_E: jax.Array
  z_sum: jax.Array
  entropy_sum: jax.Array
  count_histogram_K1: jax.Array
  dropped_sum: jax.Array
  count_T: jax.Array
  policy: PolicyTerms | None
  sums: dict[str, jax.Array]
  sequences: "SequenceSums | None"
  choice: Choice | None = None


class SequenceSums(NamedTuple):
  """The balance loss's sums for each sequence (row) of a batch, [B, E]: rows sent to each expert, probabilities."""

  assigned_BE: jax.Array
  prob_BE: jax.Array


class RouterState(NamedTuple):
  """What routing carries from step to step besides parameters; [Z, ...] outside the scan.

  Attributes:
    bias_E: added to the router logits for the choice of experts only (loss-free balancing).
    load_E: running share of the rows that each expert gets, times E: 1 is the fair share.
    count_shift: the greedy rule's calibration, in experts (`count_policy.greedy_count`): a `budget_table`, [] or [J].
    method: the method's own by name: thresholds, coefficients, running means.
  """

  bias_E: jax.Array
  load_E: jax.Array
  count_shift: jax.Array
  method: dict[str, jax.Array]


class Observed(NamedTuple):
  """What a step tells the controllers; [Z, ...] over layers.

  Attributes:
    asked: [] or [J], tokens by the budget they asked for (`budget_table.shares`).
    count_mean: [Z] or [Z, J], realised experts per token at each budget of the table.
    greedy_mean: as count_mean, by the inference rule on the same tokens; 0 for a router without a policy.
    assigned_ZE: rows by expert.
    token_count: [], tokens summed over.
    sums: as in `RouterStats`.
    advantage_mean_square: [], of the decisions that teach a policy, in nats squared.
  """

  asked: jax.Array
  count_mean: jax.Array
  greedy_mean: jax.Array
  assigned_ZE: jax.Array
  token_count: jax.Array
  sums: dict[str, jax.Array]
  advantage_mean_square: jax.Array


class Decisions(NamedTuple):
  """Choices to replay instead of making them; None leaves that choice to the router."""

  count_T: jax.Array | None = None
  expert_TK: jax.Array | None = None


class Caps(NamedTuple):
  """Upper bounds on what inference spends (`cap.py`).

  Attributes:
    experts: int32, most experts of a token: [B] by sequence, or [T].
    rows: int32 [], (token, expert) rows that a layer's tokens share; None: no such bound.
  """

  experts: jax.Array
  rows: jax.Array | None = None


class RouterContext(NamedTuple):
  """Everything a router reads besides its parameters and the hidden state.

  Attributes:
    mask_T: bool, False for padding.
    budget_T: float32, the mean count that is asked for.
    embedding_TD: the tokens' input embeddings, without gradient.
    state: this layer's `RouterState`.
    key: randomness of training (sampled counts, dropout); None: inference.
    decisions: choices to replay.
    budget_B: float32, the same for each row of the batch; tokens are B equal rows, one after the other. None: one row.
    greedy_T: bool, tokens that take the inference rule's count although there is a key; None: no such.
    caps: bounds on the counts, which the layer holds the router's choice to; None: none.
  """

  mask_T: jax.Array
  budget_T: jax.Array
  embedding_TD: jax.Array
  state: RouterState
  key: jax.Array | None
  decisions: Decisions
  budget_B: jax.Array | None = None
  greedy_T: jax.Array | None = None
  caps: Caps | None = None

  @property
  def num_sequences(self) -> int:
    """B."""
    return 1 if self.budget_B is None else self.budget_B.shape[0]


def initial_router_state(num_layers: int, num_experts: int) -> RouterState:
  """Returns the [Z, ...] state of an untrained model, without the method's own (`Router.initial_state`)."""
  return RouterState(
    bias_E=jnp.zeros((num_layers, num_experts)),
    load_E=jnp.ones((num_layers, num_experts)),
    count_shift=jnp.zeros(num_layers),
    method={},
  )


def stats_without_experts(mask_T: jax.Array, num_experts: int, slots: int) -> RouterStats:
  """Returns the [1, ...] statistics of a model without experts: one layer, whose tokens take none."""
  nothing_TK = jnp.zeros((1, mask_T.size, slots), jnp.int32)
  tokens_1 = mask_T.sum(keepdims=True).astype(jnp.float32)
  zeros_1, zeros_1E = jnp.zeros(1), jnp.zeros((1, num_experts))
  return RouterStats(
    token_count=tokens_1,
    assigned_E=zeros_1E,
    prob_sum_E=zeros_1E,
    z_sum=zeros_1,
    entropy_sum=zeros_1,
    count_histogram_K1=tokens_1[:, None] * jax.nn.one_hot(0, slots + 1),
    dropped_sum=zeros_1,
    count_T=jnp.zeros((1, mask_T.size), jnp.int32),
    policy=None,
    sums={},
    sequences=None,
    choice=Choice(jnp.zeros((1, mask_T.size, num_experts)), nothing_TK, nothing_TK > 0),
  )


def collect_stats(
  logits_TE: jax.Array,
  assignment: Assignment,
  mask_T: jax.Array,
  policy: PolicyTerms | None,
  sums: dict[str, jax.Array] | None = None,
  balance_TE: jax.Array | None = None,
  num_sequences: int | None = None,
) -> RouterStats:
  """Sums a layer's statistics over the tokens of `mask_T`.

  Args:
    logits_TE: of the router.
    assignment: the experts of each token.
    mask_T: False for padding.
    policy: terms of a learned count policy.
    sums: the method's own, summed already.
    balance_TE: what the balance loss takes for probabilities; by default the logits' softmax.
    num_sequences: B, to have the balance loss's sums for each sequence too.
  """
  num_experts, slots = logits_TE.shape[1], assignment.expert_TK.shape[1]
  mask_T = mask_T.astype(jnp.float32)
  log_normaliser_T = jax.nn.logsumexp(logits_TE, axis=-1)
  log_prob_TE = logits_TE - log_normaliser_T[:, None]
  prob_TE = jnp.exp(log_prob_TE)
  count_T = assignment.valid_TK.sum(-1)
  taken_TKE = jax.nn.one_hot(assignment.expert_TK, num_experts) * assignment.valid_TK[..., None]
  balance_TE = prob_TE if balance_TE is None else balance_TE
  sequences = None
  if num_sequences is not None:

    def per_sequence(values_TE):
      return values_TE.reshape(num_sequences, -1, num_experts).sum(1)

    sequences = SequenceSums(per_sequence(taken_TKE.sum(1)), per_sequence(mask_T[:, None] * balance_TE))
  return RouterStats(
    token_count=mask_T.sum(),
    assigned_E=taken_TKE.sum((0, 1)),
    prob_sum_E=mask_T @ balance_TE,
    z_sum=mask_T @ jnp.square(log_normaliser_T),
    entropy_sum=-mask_T @ (prob_TE * log_prob_TE).sum(-1),
    count_histogram_K1=mask_T @ jax.nn.one_hot(count_T, slots + 1),
    dropped_sum=jnp.zeros(()),
    count_T=count_T,
    policy=policy,
    sums=sums or {},
    sequences=sequences,
  )
