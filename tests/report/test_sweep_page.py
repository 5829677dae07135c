"""A sweep's table and page, from made-up runs."""

import json

import pytest

from moe_lab.errors import UserError
from moe_lab.report.sweep_page import write_sweep_report
from moe_lab.report.sweep_runs import best_first, groups_of, read_sweep, sweep_text
from tests.report.synthetic import write_run
from tests.report.test_run_page import Reader

LOSSES = {("a", "0"): 3.2, ("a", "1"): 3.4, ("b", "0"): 3.1, ("b", "1"): 3.1}


def write_sweep(workdir, losses=LOSSES):
  """Writes a sweep of the runs in `losses`, one that failed, and one that waits."""
  runs = []
  for (arm, seed), loss in losses.items():
    name = f"{arm}-{seed}"
    runs.append({"name": name, "labels": {"arm": arm, "seed": seed}, "failed": None})
    write_run(workdir / name, method="topk")
    path = workdir / name / "evaluation.json"
    final = json.loads(path.read_text())
    result = {"val_loss": loss, "test_loss": loss + 0.1, "mean_experts": 2.0, "eval_mean_experts": 1.9}
    path.write_text(json.dumps(final | {"result": result}))
  runs.append({"name": "c-0", "labels": {"arm": "c", "seed": "0"}, "failed": "diverged <at> step 3"})
  runs.append({"name": "c-1", "labels": {"arm": "c", "seed": "1"}, "failed": None})
  runs = [run | {"overrides": {"train.steps": 3, "data.sources": ["<s>"]}, "log": None} for run in runs]
  sweep = {"sweep": "s.py", "launcher": "local", "command": "python -m <it>", "runs": runs}
  workdir.mkdir(exist_ok=True)
  (workdir / "sweep.json").write_text(json.dumps(sweep))
  return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return write_sweep(tmp_path_factory.mktemp("sweep") / "w")


def test_runs_and_their_means_over_seeds(workdir):
  runs = read_sweep(workdir)["runs"]
  assert [run["state"] for run in runs] == ["finished"] * 4 + ["failed", "waiting"]
  assert runs[0]["result"]["tokens"] == 1000 * 4096 and len(runs[0]["evals"]) == 5
  b, a = best_first(groups_of(runs))
  # 3.2 and 3.4: mean 3.3, standard deviation 0.2 / sqrt(2).
  assert a["name"] == "a" and a["val_loss"] == {"mean": pytest.approx(3.3), "spread": pytest.approx(0.2 / 2**0.5)}
  assert b["val_loss"] == {"mean": pytest.approx(3.1), "spread": pytest.approx(0)}


def test_the_table(workdir):
  lines = sweep_text(read_sweep(workdir)).splitlines()
  assert lines[0].split()[:3] == ["arm", "seed", "state"] and lines[1].split()[:4] == ["a", "0", "finished", "3.2000"]
  assert lines[5].split() == ["c", "0", "failed", *["–"] * 6]
  best = lines.index("mean ± standard deviation over seeds, best first") + 2
  assert lines[best].startswith("b") and "3.3000 ± 0.1414" in lines[best + 1]


def test_the_page_says_it_all_and_needs_nothing(workdir):
  text = write_sweep_report(workdir).read_text()
  page = Reader(text)
  assert page.headings == ["Means over seeds", "Learning curves", "All runs", "Failed runs", "How it was made"]
  assert page.links == [f"{arm}-{seed}/report.html" for arm, seed in LOSSES]
  assert len(page.pictures) == 2 and all("Validation loss" in picture for picture in page.pictures)
  assert "http" not in text.replace("http-equiv", "") and "url(" not in text
  for words in ("4 finished, 1 failed, 1 waiting", "diverged &lt;at&gt; step 3", "3.3000 ± 0.1414"):
    assert words in text
  assert "<at>" not in text and "<it>" not in text and "<s>" not in text


def test_a_sweep_of_which_nothing_is_finished(tmp_path):
  text = write_sweep_report(write_sweep(tmp_path / "w", {})).read_text()
  assert "No run is finished yet." in text and Reader(text).pictures == []
  with pytest.raises(UserError, match="no sweep in"):
    write_sweep_report(tmp_path)
