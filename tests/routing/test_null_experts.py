"""Null experts by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, ModelConfig, RoutingConfig
from moe_lab.errors import ConfigError
from moe_lab.routing.base import Decisions
from moe_lab.routing.null_experts import NullExperts, real_count

X = jnp.log(jnp.asarray([[8.0, 4, 2, 1, 3, 3], [1, 2, 4, 8, 16, 32]]))  # four real logits, two null


def route(make_context, level=0.0, decisions=Decisions(), **fields):
  router = NullExperts(RoutingConfig(method="null_experts", k_max=3, num_null_experts=2, **fields))
  context = make_context(2, 4, dim=6, decisions=decisions)
  context = context._replace(state=context.state._replace(method={"level": jnp.asarray(level)}))
  return router({"router_DE": jnp.eye(6)[:, :4], "null_DU": jnp.eye(6)[:, 4:]}, X, context)


def test_real_count_by_hand():
  # Three slots. 8 4 | 3: two real; 32 16 | 8: one; nulls that are worst: three; nulls that are best: none.
  score_TK = jnp.asarray([[8.0, 4, 2], [8, 4, 2], [8, 4, 2], [8, 4, 2]])
  null_TU = jnp.asarray([[3.0, 3, 1], [16, 32, 1], [0, 1, 1], [9, 9, 9]])
  np.testing.assert_array_equal(real_count(score_TK, null_TU), [2, 1, 3, 0])


def test_gates_share_with_the_null_experts(make_context):
  assignment, stats = route(make_context)
  np.testing.assert_array_equal(stats.count_T, [2, 1])
  np.testing.assert_array_equal(assignment.expert_TK[:, 0], [0, 3])
  # 8, 4 and one null of 3; 8 and nulls of 16 and 32.
  np.testing.assert_allclose(assignment.gate_TK, [[8 / 15, 4 / 15, 0], [8 / 56, 0, 0]], rtol=1e-5)
  assert assignment.identity_T is None
  assert stats.assigned_E.sum() == 3  # null experts take no row


def test_identity_gives_the_input_back(make_context):
  assignment, _ = route(make_context, null_output="identity")
  # Of all experts' weight, taken or not: 21 and 63.
  np.testing.assert_allclose(assignment.identity_T, [3 / 21, 48 / 63], rtol=1e-5)
  np.testing.assert_allclose(assignment.gate_TK, [[8 / 21, 4 / 21, 0], [8 / 63, 0, 0]], rtol=1e-5)


def test_a_generous_level_is_a_handicap_of_the_null_experts(make_context):
  # exp(-2) of 16 and 32 is 2.2 and 4.3: before the second real expert of token 1 (4) is one null, before the third
  # (2) are two.
  _, stats = route(make_context, level=2.0)
  np.testing.assert_array_equal(stats.count_T, [3, 2])
  _, stats = route(make_context, level=-5.0, k_min=0)
  np.testing.assert_array_equal(stats.count_T, [1, 1])  # of three slots two null experts fill two


def test_replayed_counts_leave_the_rest_to_null_experts(make_context):
  assignment, _ = route(make_context, decisions=Decisions(count_T=jnp.asarray([3, 2])))
  np.testing.assert_allclose(assignment.gate_TK, [[8 / 14, 4 / 14, 2 / 14], [8 / 44, 4 / 44, 0]], rtol=1e-5)


def test_too_few_null_experts_are_refused():
  with pytest.raises(ConfigError, match="num_null_experts.*at least 6"):
    Config(ModelConfig(), RoutingConfig(method="null_experts", num_null_experts=5))
