"""The retrofit study's summary and page, of measurements that are written down here; and its mistakes."""

import pytest

from experiments.retrofit import page, study
from moe_lab.errors import UserError


def measured(policy, random, alike, one):
  def trade(experts, rise):
    return {"experts": experts, "saved": 1 - experts / 4, "rise": rise, "budget": experts}

  return {
    "full": {"experts": 4.0, "loss": 2.0},
    "policy": [trade(2.0, policy), trade(3.0, policy / 2)],
    "random": [trade(2.0, random), trade(3.0, random / 2)],
    "alike": [trade(2.0, alike), trade(3.0, alike / 2)],
    "fixed": [trade(1.0, one), trade(2.0, alike), trade(3.0, alike / 2)],
  }


RUNS = [
  {"arm": "curvature_any", "seed": 0} | measured(0.004, 0.02, 0.012, 0.05),
  {"arm": "curvature_any", "seed": 1} | measured(0.008, 0.04, 0.024, 0.03),
]


def test_means_over_seeds_and_what_a_case_proves():
  first, second = study.summarised(RUNS)
  assert first["policy_rise"] == pytest.approx(0.006) and first["random_rise"] == pytest.approx(0.03)
  assert first["rise_by_seed"] == {"0": 0.004, "1": 0.008} and first["policy_saved"] == pytest.approx(0.5)
  assert first["proves"] and not second["proves"]  # of three experts, equal counts lose 0.9%


def test_the_page_draws_policies_and_controls():
  found = {"runs": RUNS, "summary": study.summarised(RUNS), "split": "test", "upcycled": []}
  drawn = page.page_of(found, "python -m study")
  for words in ("policies", "dealt out at random", "every token the mean", "fixed counts", "+0.60%", "proves nothing"):
    assert words in drawn
  assert drawn.count("<figure") == 2


def test_a_mistake_is_a_line(tmp_path):
  study.FLAGS(["study", "--arms=curvture"])
  with pytest.raises(UserError, match="--arms=curvture: wanted some of curvature.*did you mean 'curvature'"):
    study.main(tmp_path)
  study.FLAGS(["study", "--arms=ppo", "--bases=one"])
  with pytest.raises(UserError, match="--bases=one: wanted 3, one for each of --seeds"):
    study.main(tmp_path)
  study.FLAGS.unparse_flags()
