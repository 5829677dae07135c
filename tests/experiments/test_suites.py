"""`evaluate --suite` on a run of random weights: what it writes, and every mistake in one line."""

import json

import pytest

pytest.importorskip("bm25s")

from experiments import evaluate
from moe_lab.errors import UserError
from tests.evaluate.random_run import random_run, texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a run, a suite of two tasks, and texts."""
  folder = tmp_path_factory.mktemp("suites")
  random_run(folder / "run", folder / "cache")
  (folder / "mine").mkdir()
  (folder / "texts").mkdir()
  lines = [line.strip() for line in texts()[0].splitlines() if len(line.strip()) > 30]
  common = [{"id": str(i), "kind": ("cloze", "sums")[i % 2], "difficulty": i} for i in range(4)]
  choices = [item | {"prompt": lines[i], "choices": lines[i + 1 : i + 4], "answer": 0} for i, item in enumerate(common)]
  exact = [item | {"prompt": f"{i} + 1 =", "answer": f"{i + 1}"} for i, item in enumerate(common[:3])]
  for name, items in (("choices", choices), ("exact", exact)):
    (folder / "mine" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
  for number, text in enumerate(texts()[1:4]):
    (folder / "texts" / f"{number}.txt").write_text(text)
  return folder


def run(place, *arguments):
  for name in evaluate.FLAGS:
    evaluate.FLAGS[name].unparse()
  evaluate.FLAGS(["evaluate", *arguments])
  return evaluate.main(place / "run")


@pytest.mark.slow
def test_a_suite_at_two_budgets_with_and_without_passages(place):
  flags = (f"--suite={place}/mine", "--budgets=1,4", f"--retrieve={place}/texts", "--slots=3", "--context=400")
  result = run(place, *flags)
  record = json.loads((place / "run" / "suite-mine.json").read_text())
  assert (place / "run" / "suite-mine.html").stat().st_size > 5000
  assert record["step"] == 1 and record["budgets"] == [1.0, 4.0] and record["retrieve"]["passages"] > 20
  for name, items in (("choices", 4), ("exact", 3)):
    one, four = record["tasks"][name]["by_budget"]
    assert one["items"] == items and 1.0 <= one["mean_experts"] <= four["mean_experts"] <= 4.0
    assert one["retrieved"]["tokens_per_item"] > 2 * one["tokens_per_item"]
    assert one["retrieved"]["flops_per_item"] > 2 * one["flops_per_item"]
    assert result["tasks"][name]["by_budget"][1]["retrieved"]["items"] == items
  one, four = record["tasks"]["choices"]["by_budget"]  # the same tokens are read at either
  assert one["tokens_per_item"] == four["tokens_per_item"] and one["mean_experts"] < four["mean_experts"]
  assert one["flops_per_token"] < four["flops_per_token"]
  assert record["by_kind"][0]["alone"].keys() == {"cloze", "sums"}
  # Fewer items are another question: what was there is kept.
  again = run(place, f"--suite={place}/mine", "--tasks=exact", "--limit=2")
  assert again["tasks"]["exact"]["by_budget"][0]["items"] == 2 and (place / "run" / "suite-mine.step1.1.json").exists()


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--limit=3",), "--limit=3: wanted with --suite only"),
    (("--suite=small", "--budget=3"), "--budget=3.0: wanted without --suite only"),
    (("--suite=smal",), "--suite=smal: wanted small, reference or a folder of tasks .did you mean 'small'"),
    (("--suite=small", "--budgets=1,x"), "--budgets=x: wanted a number"),
    (("--suite={}/mine", "--budgets=9"), "--budgets=9: wanted a number from 1 to 4"),
    (("--suite={}/mine", "--data=x"), "--data=x: wanted with --suite=small or reference only"),
    (("--suite={}/mine", "--tasks=exat"), "--tasks=exat: wanted one of choices, exact .did you mean 'exact'"),
    (("--suite={}/mine", "--retrieve={}/mine2"), "mine2: wanted a folder with texts"),
    (("--suite={}/run",), "wanted a folder with tasks"),
    (("--suite={}/mine", "--context=10"), "--context=10: wanted"),
  ],
)
def test_a_mistake_is_one_line(place, flags, words):
  with pytest.raises(UserError, match=words):
    run(place, *(flag.format(place) for flag in flags))
