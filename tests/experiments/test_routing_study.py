"""The routing study: what it makes of its runs' records, and a small one from end to end."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.routing_study import arms, results, runner
from moe_lab.config.sweep import load_sweep
from moe_lab.launch import local
from moe_lab.report.study_page import study_page
from tests.experiments.study_records import analysed, study_runs
from tests.experiments.test_programs import ROOT
from tests.report.test_run_page import Reader


@pytest.fixture(scope="module")
def study():
  return analysed(study_runs())


def test_an_arm_is_its_seeds(study):
  assert [row["arm"] for row in study["arms"]][:6] == [
    "topk-1", "topk-2", "topk-4", "random-2", "null-2", "dynamic-2",
  ]  # fmt: skip
  row = study["arms"][3]
  assert row["seeds"] == ["0", "1"] and row["failed"] == {"2": "3 updates <in a row>"}
  # 3.9 and 4.0: mean 3.95, standard deviation 0.1 / sqrt(2).
  assert row["loss"]["mean"] == pytest.approx(3.95) and row["loss"]["spread"] == pytest.approx(0.1 / math.sqrt(2))
  assert row["dead_experts"] == [0, 1] and row["max_over_mean_load"] == pytest.approx([1.0, 2.8])
  assert row["by_class"]["word"] == {"loss": pytest.approx(4.95), "mean_experts": 2.5, "tokens": 60}
  assert row["alarms"] == {"1": ["layer 1: 1 of 4 experts are dead"]}
  assert row["training_flops"]["mean"] == pytest.approx(3000 * 202)


def test_ours_against_its_controls(study):
  entries = {entry["control"]: entry for entry in study["comparisons"] if entry["arm"] == "dynamic-2"}
  assert list(entries) == ["own counts, shuffled", "random-2", "null-2", "fixed k, interpolated to our FLOPs"]
  shuffled = entries["own counts, shuffled"]
  # -0.06 and -0.05: mean -0.055, error 0.00707 / sqrt(2) = 0.005.
  assert shuffled["mean"] == pytest.approx(-0.055) and shuffled["standard_error"] == pytest.approx(0.005)
  assert shuffled["win"] and shuffled["matched"] and shuffled["flops_ratio"] == 1.0
  random = entries["random-2"]
  assert random["win"] and random["matched"] and random["flops_ratio"] == pytest.approx(200 / 202)
  # Ours equals null on one seed, and that spends 15% more: neither a win nor equal compute.
  assert not entries["null-2"]["win"] and not entries["null-2"]["matched"]
  curve = entries["fixed k, interpolated to our FLOPs"]
  assert curve["by_seed"] == {"0": pytest.approx(-0.1), "1": pytest.approx(-0.09)} and curve["win"]
  assert {e["control"] for e in study["comparisons"] if e["arm"] == "dynamic-3"} == {
    "fixed k, interpolated to our FLOPs"
  }
  at_three = next(e for e in study["comparisons"] if e["arm"] == "dynamic-3")
  interpolated = 3.8 - 0.2 * math.log(1.5) / math.log(2)
  assert at_three["by_seed"]["0"] == pytest.approx(3.5 - interpolated)


def test_a_control_that_failed_is_no_win(study):
  entries = [{**entry, "by_seed": {}, "win": False, "matched": False} if entry["control"] == "random-2" else entry
             for entry in study["comparisons"]]  # fmt: skip
  assert "control failed" in study_page(study | {"comparisons": entries})
  random = next(entry for entry in study["comparisons"] if entry["control"] == "random-2")
  assert results.won(random) and not results.won(random | {"seeds": 3})
  runs = [run | {"failed": "diverged"} if run["labels"]["arm"] == "random-2" else run for run in study_runs()]
  entries = {e["control"]: e for e in arms.comparisons(arms.arms_of(runs)) if e["arm"] == "dynamic-2"}
  assert entries["random-2"]["by_seed"] == {} and not results.won(entries["random-2"])


def test_one_checkpoint_at_many_budgets(study):
  two, three = study["conditioned"]
  assert two["alone"] == "dynamic-2" and two["realised"] == pytest.approx(2.04) and two["holds"]
  assert two["loss_ratio"] == pytest.approx(3.77 / 3.755)
  assert not three["holds"]  # 3.2 for a budget of 3


def test_experts_needed(study):
  found = {entry["family"]: entry for entry in study["experts_needed"]}
  assert set(found) == {"dynamic", "dynamic, any budget"}
  # Seed 0: from 3.7 at 2 to 3.5 at 3, 3.6 half way in the logarithm: sqrt(6).
  assert found["dynamic"]["needed"]["0"] == pytest.approx(math.sqrt(6))
  assert found["dynamic, any budget"]["needed"]["0"] == pytest.approx(3.2)
  assert found["dynamic"]["reference"] == 4 and not found["dynamic"]["saturated"]


def test_removal(study):
  (entry,) = study["removals"]
  assert entry["arm"] == "dynamic-2" and entry["seeds"] == 2
  assert entry["max_rise"] == {"mean": pytest.approx(0.3), "spread": pytest.approx(0)}
  assert entry["mean_rise"]["mean"] == pytest.approx(0.15) and entry["max_over_mean_load"]["mean"] == 2.8


def test_against_dense_models(study):
  found = {entry["arm"]: entry for entry in study["against_dense"]}
  assert "dense-400" not in found
  # Dense reaches 3.8 half way from 400 to 800; topk-2 spends 200 there.
  assert found["topk-2"]["flops_ratio"] == pytest.approx(math.sqrt(400 * 800) / 200)
  assert found["topk-1"]["flops_ratio"] is None  # 4.0 is above all dense models: nothing is extrapolated
  # topk-2 ends at 3.8; the largest dense model no better is that of 400 (3.9). On the way from 4.3 at 500 tokens to
  # 3.8 at 1000 it comes by 3.9 at 500 * 2^0.8 tokens.
  assert found["topk-2"]["tokens_ratio"] == pytest.approx(1000 / (500 * 2**0.8))
  # Dense takes 20 s for its 1000 tokens, topk-2 10 s.
  assert found["topk-2"]["seconds_ratio"] == pytest.approx(2 * 1000 / (500 * 2**0.8))
  dense = next(fit for fit in study["scaling"] if fit["family"] == "dense")
  assert dense["models"] == 6 and dense["beta"] is None and dense["alpha"]["value"] > 0


def test_result_and_tables(study, tmp_path):
  summary = results.summary(study)
  assert summary["failed"] == ["books-random-2-2"] and summary["runs"] == len(study["runs"])
  assert summary["wins"]["books-dynamic-2"]["controls"]["random-2"]
  assert not summary["wins"]["books-dynamic-2"]["against_all"]
  text = results.text(study)
  assert "UNEQUAL" in text and "ALARM" in text and "3.8500 ± 0.0707" in text
  results.save(tmp_path, study)
  assert json.loads((tmp_path / "study-validation.json").read_text())["split"] == "validation"


def test_the_page_says_it_all_and_needs_nothing(study):
  text = study_page(study)
  reader = Reader(text)
  assert reader.links == [] and "http" not in text.replace("http-equiv", "")
  assert len(reader.pictures) == 3 and all("books" in picture for picture in reader.pictures)
  assert reader.headings[:4] == [
    "Loss against compute per token", "Loss against training compute", "Loss against wall clock",
    "Ours against its controls",
  ]  # fmt: skip
  assert "FLOPs differ" in text and "<b>win</b>" in text and "<space>" not in text and "<study>" not in text
  empty = {key: [] for key in study} | {"sweep": "a", "split": "test", "command": "b"}
  assert "No run is finished yet." in study_page(empty)


@pytest.mark.parametrize("what", ["cpu", "cpu_methods", "cpu_sizes", "gpu", "gpu_sizes", "smoke"])
def test_the_committed_sweep(what):
  sweep = load_sweep(f"{ROOT}/configs/sweeps/routing_study.py:{what}")
  for run in sweep.runs:
    assert run.notes["role"] and run.notes["family"] and float(run.notes["budget"]) > 0
    if run.overrides["routing.method"] in ("topk", "dynamic"):
      sweep.config(run)
  if what == "cpu":
    tuned = {run.labels["seed"] for run in sweep.runs if run.labels["corpus"] == "stdlib"}
    reported = {run.labels["seed"] for run in sweep.runs if run.labels["corpus"] == "addresses"}
    assert len(tuned) == len(reported) == 3 and not tuned & reported


SWEEP = """from moe_lab.config import base_config
from moe_lab.config.sweep import Sweep, axis, product

def get_sweep(arg=None):
  base = base_config()
  base.model.dim = 16
  base.model.num_layers = 2
  base.model.num_experts = 4
  base.model.expert_dim = 8
  base.model.head_dim = 8
  base.routing.k_max = 4
  base.routing.warmup_steps = 2
  base.data.vocab_size = 27
  base.data.seq_len = 32
  base.data.sources = ("synthetic:difficulty",)
  base.train.steps = int(arg or 4)
  base.train.batch_size = 8
  base.train.log_every = 2
  base.train.eval_batches = 1
  arms = axis("arm", {"topk-2": {"routing.method": "topk"}}, role="fixed", k="2", budget="2", removal="yes")
  arms += axis("arm", {"dynamic-2": {}}, role="ours", budget="2", controls="shuffled,fixed", budgets="1.5,3")
  return Sweep(base, product(arms, axis("seed", {"0": {}})))
"""


def study_of(folder, *arguments):
  environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT), "MOE_LAB_CACHE": f"{folder}/c"}
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.routing_study.study", "--workdir=w", *arguments],
    cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--sweep=s.py", "--arms=topk2"], ["--arms=topk2", "did you mean 'topk-2'"]),
    (["--sweep=s.py", "--seeds=7"], ["--seeds=7", "wanted some of 0"]),
    (["--sweep=s.py", "--corpora=books"], ["--corpora=books"]),
    (["--sweep=s.py", "--split=tset"], ["--split=tset", "test"]),
    (["--sweep=t.py"], ["--sweep=t.py", "did you mean 's.py'"]),
    (["--sweep=s.py:0"], ["config.train.steps = 0"]),
  ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, words):
  (tmp_path / "s.py").write_text(SWEEP)
  process = study_of(tmp_path, *arguments)
  out, err = process.communicate(timeout=120)
  (line,) = err.splitlines()
  assert process.returncode == 2 and out == "" and all(word in line for word in words), line


@pytest.mark.slow  # trains two runs and evaluates each under several rules
def test_a_study_from_end_to_end(tmp_path):
  (tmp_path / "s.py").write_text(SWEEP)
  # Stopped while the first run trains, it leaves with 75 and goes on from there.
  process = study_of(tmp_path, "--sweep=s.py:4000", "--workers=2")
  while not (tmp_path / "w" / "topk-2-0" / "metrics.jsonl").is_file():
    time.sleep(0.1)
  time.sleep(2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=300) == 75
  process.communicate()
  (tmp_path / "w").rename(tmp_path / "stopped")

  process = study_of(tmp_path, "--sweep=s.py")
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  first = json.loads(out.splitlines()[-1])
  assert first["runs"] == 2 and first["failed"] == [] and set(first["loss"]) == {"-topk-2", "-dynamic-2"}
  study = json.loads((tmp_path / "w" / "study-validation.json").read_text())
  rules = {run["labels"]["arm"]: list(run["rules"]) for run in study["runs"]}
  assert rules["topk-2"] == ["own", "removal"]
  assert rules["dynamic-2"] == ["own", "shuffled", "fixed", "budget 1.5", "budget 3"]
  Reader((tmp_path / "w" / "study-validation.html").read_text())

  # Again: nothing is trained, nothing is measured, and the result is the same.
  before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "w").glob("*/*.json*")}
  process = study_of(tmp_path, "--sweep=s.py", "--workers=2")
  out, err = process.communicate(timeout=600)
  assert json.loads(out.splitlines()[-1]) == first
  assert {path: os.stat(path).st_mtime_ns for path in before} == before


def test_a_worker_that_was_told_to_stop_takes_no_further_job(monkeypatch, tmp_path):
  taken = []

  def perform(job, stop):
    taken.append(job.folder.name)
    raise SystemExit(75)

  monkeypatch.setattr(local, "_leaving", False)
  monkeypatch.setattr(local.os, "dup2", lambda *_: None)  # stderr stays pytest's
  for name in ("first", "second"):
    with pytest.raises(SystemExit):
      local.perform_apart(perform, runner.Job(tmp_path / name, None, {}, "validation", []))
  assert taken == ["first"]
