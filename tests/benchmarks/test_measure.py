"""Contenders in processes of their own: what they report, how it is summed up and kept."""

import dataclasses
import json

import pytest

from benchmarks import plot, results
from benchmarks.case import MIXED, NEW, PRESETS, Case
from benchmarks.measure import Result, measure
from benchmarks.worker import Contender
from experiments.benchmark import _decode_cases
from moe_lab.errors import RunError

SMALL = Case(
  vocab_size=64, dim=16, num_layers=1, num_heads=2, head_dim=8, num_experts=4, expert_dim=8, batch_size=2, seq_len=32,
  k_max=4,
)  # fmt: skip
MACHINE = {
  "processor": "x", "cores": 2, "memory_gib": 1.0, "accelerator": None, "versions": {"python": "3", "torch": None}
}  # fmt: skip


def result(name="moe_lab", experts=2.0, seconds=0.5, per_second=100.0, case="a", rival=True) -> Result:
  side = "ours" if name == "moe_lab" else "peer"
  numbers = {"mean_experts": experts}
  rival = rival and side == "peer"
  return Result(name, case, side, rival, "token", seconds, 0.4, 0.6, per_second, 1e9, 2**20, 1.0, numbers)


@pytest.mark.slow
def test_contenders_take_turns():
  contenders = [Contender("ours", "train_step", dataclasses.replace(SMALL, method=m)) for m in ("topk", "dynamic")]
  notes = []
  measured, peak = measure(contenders, 2, "cpu", notes.append)
  assert [r.case for r in measured] == [c.case.name for c in contenders] and peak > 1e9
  topk, dynamic = measured
  assert topk.numbers["mean_experts"] == 2 and 1 < dynamic.numbers["mean_experts"] < 3.5
  assert topk.low <= topk.seconds <= topk.high and topk.per_second == pytest.approx(64 / topk.seconds)
  assert 0 < topk.flops_per_second < peak and topk.peak_bytes >= 0
  assert any("round 2 of 2" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["moe_layer", "attention", "decode"])
def test_each_benchmark_runs(benchmark):
  case = dataclasses.replace(SMALL, seq_len=256, sequences=2 if benchmark == "decode" else 0)
  [measured], _ = measure([Contender("ours", benchmark, case)], 1, "cpu", str)
  assert measured.unit == "token" and measured.flops_per_second > 0


@pytest.mark.slow
def test_tokens_under_a_mix_of_prompts_are_timed():
  # Two runs compile or find their memory cold. Two are timed, with two hard sequences of eight and with one: of them
  # the first asks for 22 rows, beyond 16.
  case = dataclasses.replace(SMALL, **MIXED, num_experts=8, sequences=8)
  contenders = [Contender("ours", "decode", case, variant) for variant in ("", "steady", "equal")]
  free, steady, equal = measure(contenders, 1, "cpu", str)[0]
  assert free.numbers["p50_ms"] <= free.numbers["p99_ms"] and steady.name == "moe_lab steady"
  assert free.numbers["mean_experts"] == pytest.approx((22 + 15) / 16)
  assert steady.numbers["mean_experts"] == pytest.approx((16 + 15) / 16)
  assert equal.numbers["mean_experts"] == pytest.approx(2)
  assert all(NEW < one.numbers["timed_steps"] < 2 * NEW for one in (free, steady, equal))
  text = results.table([free, steady], 1e12)
  assert "p99" in text and f"{steady.numbers['p99_ms']:.2f} ms" in text


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_the_mix_of_prompts_is_measured_once_a_shape(preset):
  asked = [dataclasses.replace(PRESETS[preset], method=m, k=k) for m, k in (("topk", 2), ("topk", 16), ("dynamic", 8))]
  found = _decode_cases(asked)
  assert [(c.method, c.k, c.sequences) for c in found] == [
    ("topk", 2, 1), ("topk", 2, 8), ("topk", 16, 1), ("topk", 16, 8), ("dynamic", 2, 8),
  ]  # fmt: skip
  assert all(case.config().routing.slots == (case.k if case.method == "topk" else 8) for case in found)


@pytest.mark.slow
def test_more_rows_than_any_share_foresees_are_all_computed():
  case = dataclasses.replace(SMALL, method="overflow", num_experts=8)
  [measured], _ = measure([Contender("ours", "moe_layer", case)], 1, "cpu", str)
  assert measured.numbers["rows"] == 2 * 32 * 4 and measured.numbers["rows_lost"] == 0
  assert measured.numbers["error_to_dense"] < 1e-4


def test_a_contender_that_fails_is_named():
  with pytest.raises(RunError, match="moe_lab.*16 experts.*KeyError.*no_such"):
    measure([Contender("ours", "no_such", Case())], 1, "cpu", str)


def test_ratio_is_over_the_faster_peer_in_its_usual_setting():
  measured = [
    result(per_second=300.0),
    result("transformers eager", per_second=150.0),
    result("transformers grouped_mm", per_second=200.0),
    result("transformers grouped_mm, memory kept", per_second=290.0, rival=False),
    result(case="b"),
  ]
  summary = results.summary("train_step", measured, 2e9, MACHINE)
  assert summary["ratio"] == {"a": 1.5} and summary["unit"] == "tokens per second"
  assert set(summary) >= {"ours", "peers", "ratio", "unit", "machine"}
  assert "| 50%" in results.table(measured, 2e9)


def test_files_are_never_written_over(tmp_path):
  summary = results.summary("train_step", [result()], 2e9, MACHINE)
  first, second = (results.save(tmp_path, "train_step", "table", summary, "command") for _ in range(2))
  assert first != second and "table" in first.read_text()
  assert json.loads(second.with_suffix(".json").read_text())["ours"] == {"moe_lab: a": 100.0}


def test_the_line_through_the_fixed_cost():
  measured = [result(experts=k, seconds=0.1 + 0.2 * k) for k in (1.0, 2.0, 4.0)]
  assert plot.fitted(measured) == pytest.approx((0.1, 0.2, 1.0))
  assert "100 ms + 200 ms per expert" in plot.time_by_experts(measured)
  assert plot.time_by_experts(measured[:2]) == ""
  assert plot.time_by_experts([result(experts=k) for k in (1.99, 2.0, 2.01)]) == ""
