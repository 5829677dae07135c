"""Expert choice and sequence top-k by hand; and what is refused to methods that see the future."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.config.schema import Config, ModelConfig, RoutingConfig
from moe_lab.errors import UserError
from moe_lab.infer.engine import Engine
from moe_lab.routing.expert_choice import ExpertChoice, picks
from moe_lab.routing.sequence_topk import SequenceTopK, counts_of_best


def test_picks_by_hand():
  # Three picks of two experts: the first takes one, the second two.
  score_TE = jnp.asarray([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
  np.testing.assert_array_equal(picks(score_TE, jnp.asarray(3)), [[True, False], [False, True], [False, True]])


def test_expert_choice_is_balanced_whatever_the_router_says(make_context):
  router = ExpertChoice(RoutingConfig(method="expert_choice", k_max=3, budget=1.5))
  x_TD = jnp.log(jnp.asarray([[6.0, 3, 1], [8, 1, 1], [4, 4, 2], [1, 1, 8], [9, 9, 9]]))  # tenths; the last is padding
  context = make_context(5, 3, dim=3, budget_T=jnp.full(5, 1.5), mask_T=jnp.arange(5) < 4)
  assignment, stats = router({"router_DE": jnp.eye(3)}, x_TD, context)
  # Four tokens, budget 1.5: two picks each. Expert 0: tokens 1, 0; expert 1: 2, 0; expert 2: 3, 2.
  np.testing.assert_array_equal(stats.assigned_E, [2, 2, 2])
  np.testing.assert_array_equal(stats.count_T, [2, 1, 2, 1, 0])
  np.testing.assert_allclose(assignment.gate_TK[0], [0.6, 0.3, 0], rtol=1e-5)
  assert assignment.expert_TK[3, 0] == 2


def test_counts_of_best_by_hand():
  # Two sequences of two tokens with two slots each, three and one to spend.
  score_BX = jnp.asarray([[0.9, 0.1, 0.5, 0.4], [0.3, 0.2, 0.6, 0.1]])
  np.testing.assert_array_equal(counts_of_best(score_BX, jnp.asarray([3, 1]), 2), [1, 2, 0, 1])


def test_a_sequence_spends_exactly_its_budget(make_context):
  rng = np.random.default_rng(0)
  router = SequenceTopK(RoutingConfig(method="sequence_topk", k_max=4, standardise=False))
  context = make_context(40, 6, budget_B=jnp.asarray([1.5, 3.0]), mask_T=jnp.arange(40) < 34)
  context = context._replace(budget_T=jnp.repeat(jnp.asarray([1.5, 3.0]), 20))
  _, stats = router({"router_DE": jnp.asarray(rng.normal(size=(8, 6)))}, jnp.asarray(rng.normal(size=(40, 8))), context)
  count_BL = np.asarray(stats.count_T).reshape(2, 20)
  np.testing.assert_array_equal(count_BL.sum(1), [30, 42])  # 20 * 1.5, 14 * 3
  assert count_BL[0].min() == 1 and count_BL.max() <= 4 and len(set(count_BL[0])) > 1


@pytest.mark.parametrize("method", ["expert_choice", "sequence_topk"])
def test_decoding_is_refused(method):
  config = Config(ModelConfig(), RoutingConfig(method=method))
  with pytest.raises(UserError, match=f"routing.method={method} cannot decode"):
    Engine(config, {}, None)
