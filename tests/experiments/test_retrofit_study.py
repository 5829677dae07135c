"""The retrofit study's summary and page, of measurements written down here; bases of dense models; and mistakes."""

import json

import pytest

from experiments.retrofit import page, study
from moe_lab.errors import UserError
from tests.experiments.test_programs import program, result_of


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


def test_the_page_says_whether_upcycled_bases_are_sound():
  sound = {"seed": 0, "dense": 3.2, "moved": 1e-9, "same": True, "tuned": 3.1, "one_expert_rise": 0.08, "apart": True}
  broken = sound | {"seed": 1, "moved": 0.1, "same": False, "one_expert_rise": 0.001, "apart": False}
  text = page.text({"summary": study.summarised(RUNS), "upcycled": [sound, broken]}).splitlines()
  assert "loss 3.2000 dense; upcycled the same (1.0e-09 apart); 3.1000 trained on, one expert +8.00%" in text[-2]
  assert "NOT" not in text[-2] and "NOT THE SAME (1.0e-01 apart)" in text[-1] and "COPIES NOT APART" in text[-1]


@pytest.mark.slow
def test_bases_of_dense_models(tmp_path):
  options = ("--upcycled", "--size=smoke", "--seeds=3", "--arms=curvature", "--steps=4", "--workdir=study")
  made = result_of(program(tmp_path, "retrofit.study", *options))
  [upcycled], [row] = made["upcycled"], made["summary"]
  assert upcycled["seed"] == 3 and upcycled["same"] and 0 < upcycled["tuned"] < upcycled["dense"]
  assert not upcycled["apart"] and not row["proves"]  # after 26 steps
  dense, tuned = (json.loads((tmp_path / f"study/{name}-3/config.json").read_text()) for name in ("dense", "tuned"))
  assert dense["model"]["num_dense_layers"] == 2 and dense["model"]["dense_dim"] == 32
  assert tuned["model"]["num_experts"] == 16 and tuned["model"]["expert_dim"] == 8 and tuned["routing"]["k"] == 4
  assert result_of(program(tmp_path, "retrofit.study", *options)) == made  # done: nothing is trained again
  (tmp_path / "study/tuned-3/adaptation.json").unlink()  # as if it had been cut off before its end
  assert result_of(program(tmp_path, "retrofit.study", *options)) == made
  other = program(tmp_path, "retrofit.study", *options, "--budget=2")
  assert other.returncode == 2 and "config.routing.budget = 2.0" in other.stderr


def test_a_mistake_is_a_line(tmp_path):
  study.FLAGS(["study", "--arms=curvture"])
  with pytest.raises(UserError, match="--arms=curvture: wanted some of curvature.*did you mean 'curvature'"):
    study.main(tmp_path)
  study.FLAGS(["study", "--arms=ppo", "--bases=one"])
  with pytest.raises(UserError, match="--bases=one: wanted 3, one for each of --seeds"):
    study.main(tmp_path)
  study.FLAGS(["study", "--seeds=0", "--bases=one", "--upcycled"])
  with pytest.raises(UserError, match="--bases=one: wanted without --upcycled"):
    study.main(tmp_path)
  study.FLAGS.unparse_flags()
