"""The study of adapters' drift: its arms, and what it makes of its runs' records. A small one is in test_adapt.py."""

import pytest

from experiments.adapter_drift.study import arms, summarised, table


def run(arm, seed, loss, kl, source=None):
  drift = {"loss_after": loss, "router_kl": kl, "jaccard": 0.9, "flips": 0.1, "count_drift": 0.0}
  texts = {"drift_target": drift} | ({} if source is None else {"drift_source": drift | {"loss_after": source}})
  return {"arm": arm, "seed": seed, "adapter_parameters": 7} | texts


def test_every_weight_of_the_divergence_is_an_arm():
  assert list(arms([0.1, 10.0])) == ["frozen", "trained", "held_0.1", "held_10"]
  assert arms([0.1])["held_0.1"] == {"router": "held", "router_kl_weight": 0.1}


def test_the_summary_is_the_mean_over_seeds():
  runs = [
    run("trained", 0, 2.0, 0.3),
    run("trained", 1, 4.0, 0.5),
    run("held_1", 0, 3.01, 0.1),
    run("frozen", 0, 3.1, 0.2),
  ]
  found = summarised(runs)
  assert found["trained"]["loss"] == 3.0 and found["trained"]["target_router_kl"] == pytest.approx(0.4)
  assert found["trained"]["seeds"] == 2 and found["trained"]["source_loss"] is None
  # Within half a hundredth of 3.0, the loss of the router trained freely, or not.
  assert {arm: row["equal"] for arm, row in found.items()} == {"trained": True, "held_1": True, "frozen": False}
  assert "held_1   3.0100  -" in table(found)
  (row,) = summarised([run("held_1", 0, 3.0, 0.1, source=2.5)]).values()
  assert row["source_loss"] == 2.5 and "equal" not in row
