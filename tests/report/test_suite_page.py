"""A suite's files, page and sections, from a made-up suite."""

import json

import pytest

from moe_lab.errors import UserError
from moe_lab.report.run_page import write_report
from moe_lab.report.suite_page import suite_page, write_suite
from moe_lab.report.suites import read_suites
from moe_lab.report.sweep_page import write_sweep_report
from tests.report.made_up_suite import made_up_suite
from tests.report.synthetic import write_run
from tests.report.test_run_page import HEADINGS, Reader
from tests.report.test_sweep_page import write_sweep


@pytest.fixture(scope="module")
def suite():
  return made_up_suite()


def test_the_page_says_it_all_and_needs_nothing(suite):
  text = suite_page(suite, "<run>")
  page = Reader(text)
  assert page.headings == [
    "Quality against compute",
    "Results",
    "Experts by kind of query",
    "By difficulty",
    "How it was made",
  ]
  # Two tasks against experts and against FLOPs; experts and results by difficulty.
  assert len(page.pictures) == 6 and page.links == []
  assert "http" not in text.replace("http-equiv", "") and "url(" not in text
  for words in (
    "checkpoint of step 600",
    "budgets 1.00, 2.00, 4.00",
    "3 that hold a test item",
    "humaneval: skipped: no &lt;sandbox&gt; here",
    "with passages",
    "recall, chance",
    "en, fr",
  ):
    assert words in text, words
  assert not any(tag in text for tag in ("<run>", "<sums>", "<sandbox>", "<texts>", "<it>"))
  row = suite["tasks"]["cloze"]["by_budget"][0]
  low, high = row["interval"]
  assert (
    f"<td>{row['value']:.3f}" not in text and f"{row['value']:.3f}</td>" in text and f"{low:.3f} to {high:.3f}" in text
  )


def test_a_chart_has_a_point_for_each_budget(suite):
  text = suite_page(suite, "run")
  drawing = text[text.index("cloze: accuracy against experts") :]
  drawing = drawing[: drawing.index("</svg>")]
  # A dot is a line of no length; three budgets alone, and three with passages.
  assert drawing.count("h0") == 6 and drawing.count("dashed") == 1


def test_one_budget_is_no_curve():
  text = suite_page(made_up_suite(budgets=(2.0,), retrieve=False), "run")
  assert "One budget: a number and no curve" in text and "with passages" not in text
  assert len(Reader(text).pictures) == 2


def test_what_an_earlier_checkpoint_gave_is_kept(suite, tmp_path):
  def names():
    return sorted(path.name for path in tmp_path.iterdir())

  paths = write_suite(tmp_path, suite)
  assert paths == {"file": tmp_path / "suite-small.json", "report": tmp_path / "suite-small.html"}
  write_suite(tmp_path, suite)  # the same again
  assert names() == ["suite-small.html", "suite-small.json"]
  later = suite | {"step": 1200}
  write_suite(tmp_path, later)
  write_suite(tmp_path, suite | {"step": 1200, "limit": 5})
  kept = [f"suite-small.{number}.{end}" for number in ("step1200.1", "step600.1") for end in ("html", "json")]
  assert names() == sorted([*kept, "suite-small.html", "suite-small.json"])
  assert json.loads((tmp_path / kept[1]).read_text())["limit"] is None
  (found,) = read_suites(tmp_path)
  assert (found["step"], found["limit"]) == (1200, 5)
  (tmp_path / "suite-small.json").write_text("{")
  with pytest.raises(UserError, match="suite-small.json cannot be read"):
    read_suites(tmp_path)
  write_suite(tmp_path, suite)  # what is no record of ours is kept too
  assert (tmp_path / "suite-small.stepunknown.1.json").read_text() == "{"


def test_the_run_page_shows_its_suites(suite, tmp_path):
  workdir = write_run(tmp_path / "run", steps=20)
  assert Reader(write_report(workdir).read_text()).headings == HEADINGS
  write_suite(workdir, suite)
  page = Reader(write_report(workdir).read_text())
  assert page.headings == [*HEADINGS[:-1], "Evaluation suites", HEADINGS[-1]]
  assert page.links == ["suite-small.html"] and any("&lt;" not in name and "cloze" in name for name in page.pictures)


def test_the_sweep_page_compares_groups(tmp_path):
  workdir = write_sweep(tmp_path / "w")
  for name, step in (("a-0", 1), ("a-1", 2), ("b-0", 3)):
    write_suite(workdir / name, made_up_suite(step=step, retrieve=False))
  text = write_sweep_report(workdir).read_text()
  page = Reader(text)
  assert "Evaluation suites" in page.headings
  # Both runs of `a` gave the same, since they are made up of the same.
  row = made_up_suite(retrieve=False)["tasks"]["cloze"]["by_budget"][0]
  for name, runs in (("a", 2), ("b", 1)):
    cells = ("1.00", f"{row['value']:.3f}", f"{row['mean_experts']:.2f}", str(runs))
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    assert f'<th scope="row">{name}</th><td>small</td><td>cloze</td>{numbers}' in text
  assert sum("cloze against experts" in name for name in page.pictures) == 1
