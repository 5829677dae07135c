"""What load is balanced over, kinds of gates, groups, shared experts, jitter and gating dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.errors import ConfigError
from moe_lab.nn.moe import MoE
from moe_lab.routing import balance
from moe_lab.routing.base import Assignment, Decisions, SequenceSums, collect_stats
from moe_lab.routing.dropout import jittered, scattered
from moe_lab.routing.selection import assign, in_best_groups
from moe_lab.routing.topk import TopK

LOGITS = jnp.log(jnp.asarray([[1.0, 2, 4, 8], [8, 4, 2, 1]]))
EXPERTS, COUNTS, MASK = jnp.asarray([[3, 2, 1], [0, 1, 2]]), jnp.asarray([2, 1]), jnp.ones(2, bool)


def test_gates_over_all_experts_and_by_sigmoid():
  gate_TK = assign(LOGITS, EXPERTS, COUNTS, MASK, "softmax_all").gate_TK
  np.testing.assert_allclose(gate_TK, np.array([[8, 4, 0], [8, 0, 0]]) / 15, rtol=1e-5)
  # sigmoid(ln x) = x / (1 + x): 8/9, 4/5, 2/3, of their sum 2.3556.
  gate_TK = assign(LOGITS, EXPERTS, COUNTS, MASK, "sigmoid").gate_TK
  np.testing.assert_allclose(gate_TK, np.array([[8 / 9, 4 / 5, 0], [8 / 9, 0, 0]]) / (8 / 9 + 4 / 5 + 2 / 3), rtol=1e-5)


def test_gates_of_length_one():
  # Of 8 and 4 the length is sqrt(80); alone an expert has all of it. Padding has nothing, and a finite gradient.
  gate_TK = assign(LOGITS, EXPERTS, COUNTS, MASK, "softmax_unit").gate_TK
  np.testing.assert_allclose(gate_TK, [[8 / 80**0.5, 4 / 80**0.5, 0], [1, 0, 0]], rtol=1e-5)
  nobody = jnp.zeros(2, bool)
  gradient = jax.grad(lambda logits: assign(logits, EXPERTS, COUNTS, nobody, "softmax_unit").gate_TK.sum())(LOGITS)
  np.testing.assert_array_equal(gradient, 0)


def test_gates_that_keep_their_length():
  # softmax over the slots: 8, 4 and 2 of 14; two of them keep the length sqrt(84), and so does one.
  gate_TK = assign(LOGITS, EXPERTS, COUNTS, MASK, "softmax_kept").gate_TK
  want_TK = np.array([[8 / 80**0.5, 4 / 80**0.5, 0], [1, 0, 0]]) * 84**0.5 / 14
  np.testing.assert_allclose(gate_TK, want_TK, rtol=1e-5)
  whole = jnp.full(2, 3)
  kept, chosen = (assign(LOGITS, EXPERTS, whole, MASK, gate).gate_TK for gate in ("softmax_kept", "softmax_chosen"))
  np.testing.assert_allclose(kept, chosen, rtol=1e-6)  # with all slots nothing is left over


def test_auto_is_the_gate_that_did_best_for_the_method():
  kinds = {
    "softmax_chosen": dict(method="topk", k=2),
    "softmax_all": dict(method="random_k", budget=1.2),
    "softmax_unit": dict(method="dynamic"),
    "sigmoid": dict(method="dynamic", gate="sigmoid"),
  }
  assert {RoutingConfig(**fields).slot_gate: fields for fields in kinds.values()} == kinds
  assert RoutingConfig(method="topk", k=1).slot_gate == "softmax_all"
  assert RoutingConfig(method="random_k").standardised and not RoutingConfig(method="relu").standardised


def test_standardised_logits_do_not_grow_with_the_hidden_state(make_context):
  router = TopK(RoutingConfig(method="topk", k=2))
  shapes = router.parameters(ModelConfig(dim=4, num_experts=4))
  assert shapes["log_scale"] == ((1,), 0.0)
  parameters = {"router_DE": jnp.eye(4), "log_scale": jnp.log(jnp.asarray([3.0]))}
  logits_TE = router.logits(parameters, LOGITS)
  np.testing.assert_allclose(logits_TE.mean(1), 0, atol=1e-5)
  np.testing.assert_allclose(logits_TE.std(1), 3, rtol=1e-4)
  small, large = (router(parameters, factor * LOGITS, make_context(2, 4, dim=4))[0] for factor in (1, 100))
  np.testing.assert_allclose(small.gate_TK, large.gate_TK, rtol=1e-4)


def test_switch_learns_through_its_one_gate_and_the_softmax_over_one_does_not(make_context):
  def gate(router_DE, kind):
    router = TopK(RoutingConfig(method="topk", k=1, gate=kind, standardise=False))
    return router({"router_DE": router_DE}, LOGITS, make_context(2, 4, dim=4))[0].gate_TK[0].sum()

  # dp/dl = p (1 - p) = 8/15 * 7/15 for its own logit, which is x @ column 3.
  gradient = jax.grad(gate)(jnp.eye(4), "softmax_all")
  np.testing.assert_allclose(gradient[:, 3], LOGITS[0] * 8 * 7 / 225, rtol=1e-4)
  assert not jax.grad(gate)(jnp.eye(4), "softmax_chosen").any()


def test_a_sigmoid_router_is_balanced_by_its_own_scores(make_context):
  router = TopK(RoutingConfig(method="topk", k=1, gate="sigmoid", standardise=False))
  _, stats = router({"router_DE": jnp.eye(4)}, LOGITS[:1], make_context(1, 4, dim=4))
  score = np.array([1 / 2, 2 / 3, 4 / 5, 8 / 9])
  np.testing.assert_allclose(stats.prob_sum_E, score / score.sum(), rtol=1e-5)
  # The bias is added to scores, not to logits: 0.5 lifts expert 0 from 0.5 over 8/9.
  context = make_context(1, 4, dim=4)
  context = context._replace(state=context.state._replace(bias_E=jnp.asarray([0.5, 0, 0, 0])))
  assert router({"router_DE": jnp.eye(4)}, LOGITS[:1], context)[0].expert_TK[0, 0] == 0


def test_groups_by_hand(make_context):
  # Groups (9, 0), (5, 5), (6, 1): values 9, 10, 7. One kept: the second, although the best expert is in the first.
  score_TE = jnp.asarray([[9.0, 0, 5, 5, 6, 1]])
  np.testing.assert_array_equal(in_best_groups(score_TE, 3, 1), [[0, 0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(in_best_groups(score_TE, 3, 2), [[1, 1, 1, 1, 0, 0]])
  router = TopK(RoutingConfig(method="topk", k=2, expert_groups=3, groups_kept=1, standardise=False))
  assignment, _ = router({"router_DE": jnp.eye(6)}, score_TE, make_context(1, 6, dim=6))
  assert set(np.asarray(assignment.expert_TK[0])) == {2, 3}


@pytest.mark.parametrize(
  "fields, line",
  [
    (dict(expert_groups=3), "expert_groups.*divisor"),
    (dict(expert_groups=4, groups_kept=1, k_max=8), "groups_kept.*at least routing.k_max = 8"),
    (dict(expert_groups=4, groups_kept=3, expert_dropout=0.1), "expert_dropout.*0 with"),
    (dict(groups_kept=2), "groups_kept.*at most 1"),
    (dict(method="top_p", gate="sigmoid"), "routing.gate.*gates of its own"),
  ],
)
def test_what_does_not_fit_is_refused(fields, line):
  with pytest.raises(ConfigError, match=line):
    Config(ModelConfig(num_experts=16), RoutingConfig(**fields))


def test_fine_grained_and_shared_experts_are_a_configuration(make_context):
  # DeepSeekMoE: a shared expert adds its part to every token, whatever the router does, and costs no routed row.
  model = ModelConfig(dim=8, num_experts=4, expert_dim=6, num_shared_experts=2, dispatch="dense")
  routing = RoutingConfig(method="topk", k=1)
  layer, x_TD = MoE(model, routing, 1.0), jax.random.normal(jax.random.key(0), (5, 8))
  context = make_context(5, 4, dim=8)
  params = layer.init(jax.random.key(1), x_TD, context)["params"]
  assert params["shared"]["gate_DF"].shape == (8, 12)
  y_TD, stats = layer.apply({"params": params}, x_TD, context)
  none = context._replace(decisions=Decisions(count_T=jnp.zeros(5, jnp.int32)))
  shared_TD, _ = layer.apply({"params": params}, x_TD, none)
  routed = MoE(dataclasses.replace(model, num_shared_experts=0), routing, 1.0)
  routed_TD, _ = routed.apply({"params": {k: v for k, v in params.items() if k != "shared"}}, x_TD, context)
  np.testing.assert_allclose(y_TD, shared_TD + routed_TD, atol=1e-6)
  assert jnp.abs(shared_TD).max() > 1e-3 and stats.assigned_E.sum() == 5


def test_balance_of_each_sequence_by_hand():
  # Sequence 0 sends both rows to expert 0 with probability 1: loss E = 2. Sequence 1 is even: 1. 2 and 2 tokens.
  assigned_ZBE = jnp.asarray([[[2.0, 0], [1, 1]]])
  prob_ZBE = jnp.asarray([[[2.0, 0], [1, 1]]])
  assert balance.sequence_balance_loss(assigned_ZBE, prob_ZBE) == pytest.approx(1.5)
  # Over both together: loads 1.5 and 0.5, probabilities 0.75 and 0.25: 1.125 + 0.125.
  stats = collect_stats(jnp.zeros((4, 2)), first_experts([0, 0, 0, 1]), jnp.ones(4), None)
  stats = jax.tree.map(lambda leaf: leaf[None], stats)._replace(prob_sum_E=prob_ZBE.sum(1))
  assert balance.balance_loss(stats, "local") == pytest.approx(1.25)
  stats = stats._replace(sequences=SequenceSums(assigned_ZBE, prob_ZBE))
  assert balance.balance_loss(stats, "sequence") == pytest.approx(1.5)
  # Earlier micro-batches had 4 rows more on expert 1: loads 3/8 and 5/8 of 2.
  earlier_ZE = jnp.asarray([[0.0, 4.0]])
  assert balance.balance_loss(stats, "global", earlier_ZE) == pytest.approx(2 * (3 / 8 * 0.75 + 5 / 8 * 0.25))
  assert balance.balance_loss(stats, "local", earlier_ZE) == pytest.approx(1.25)


def first_experts(experts):
  expert_TK = jnp.asarray(experts)[:, None]
  return Assignment(expert_TK, jnp.ones(expert_TK.shape), jnp.ones(expert_TK.shape, bool))


def test_sums_of_sequences_are_those_of_their_rows():
  logits_TE = jax.random.normal(jax.random.key(0), (6, 3))
  mask_T = jnp.asarray([True, True, True, True, False, False])
  assignment = first_experts([0, 1, 1, 2, 0, 0])._replace(valid_TK=mask_T[:, None])
  stats = collect_stats(logits_TE, assignment, mask_T, None, num_sequences=2)
  np.testing.assert_array_equal(stats.sequences.assigned_BE, [[1, 2, 0], [0, 0, 1]])
  np.testing.assert_allclose(stats.sequences.prob_BE.sum(1), [3, 1], rtol=1e-5)
  np.testing.assert_allclose(stats.sequences.prob_BE.sum(0), stats.prob_sum_E, rtol=1e-5)


def test_gating_dropout_scatters_a_whole_step_or_nothing(make_context):
  assignment = Assignment(jnp.asarray([[0, 3], [1, 2]] * 100), jnp.ones((200, 2)), jnp.ones((200, 2), bool))
  scatters = 0
  for seed in range(20):
    context = make_context(200, 4, key=jax.random.key(seed))
    expert_TK = np.asarray(scattered(assignment, 4, 0.5, context).expert_TK)
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    same = (expert_TK == assignment.expert_TK).all(1).mean()
    assert same == 1 or same == pytest.approx(0.25, abs=0.13)
    scatters += same < 1
  assert 4 <= scatters <= 16
  assert scattered(assignment, 4, 0.5, make_context(200, 4)) is assignment  # inference
  replay = make_context(200, 4, key=jax.random.key(0), decisions=Decisions(expert_TK=assignment.expert_TK))
  assert scattered(assignment, 4, 0.5, replay) is assignment


def test_jitter_is_small_and_in_training_only(make_context):
  x_TD = jnp.ones((50, 8), jnp.bfloat16)
  seen_TD = jittered(x_TD, 0.1, make_context(50, 4, key=jax.random.key(0)))
  assert seen_TD.dtype == jnp.bfloat16 and 0.89 < seen_TD.min() < 0.93 and 1.07 < seen_TD.max() < 1.11
  assert jittered(x_TD, 0.1, make_context(50, 4)) is x_TD


def test_config_of_a_whole_deepseek_like_router():
  model = ModelConfig(num_experts=16, num_shared_experts=1)
  routing = RoutingConfig(
    method="topk", k=4, gate="sigmoid", expert_groups=4, groups_kept=2, bias_update_rate=1e-3, balance_scope="sequence"
  )
  assert Config(model, routing, DataConfig(), TrainConfig()).routing.slots == 4
