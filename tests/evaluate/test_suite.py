"""A folder of tasks, asked of a model that is made up: what is right, and how it is put together."""

import dataclasses
import json

import pytest

from moe_lab.errors import UserError
from moe_lab.evaluate import json_tasks
from moe_lab.evaluate.compute import Compute
from moe_lab.evaluate.outcomes import Outcome, by_kind, report, summary
from moe_lab.evaluate.scoring import Scored, Written
from moe_lab.evaluate.significance import wilson_interval
from moe_lab.evaluate.suite import Skipped, run

CHOICES = [
  {
    "id": "0",
    "kind": "recall",
    "difficulty": None,
    "prompt": "The capital is",
    "choices": ["Rome", "Oslo"],
    "answer": 1,
  },
  {
    "id": "1",
    "kind": "cloze",
    "difficulty": 2,
    "language": "fr",
    "prompt": "Il ",
    "choices": ["aaaa", "b"],
    "answer": 0,
  },
  {
    "id": "2",
    "kind": "cloze",
    "difficulty": 10,
    "language": "fr",
    "prompt": "a",
    "choices": ["?", "x", "y"],
    "answer": 2,
  },
]
EXACT = [{"id": "0", "kind": "reasoning", "difficulty": 1, "language": "en", "prompt": "1 + 1 =", "answer": "2"}]


def write(folder, **tasks):
  for name, items in tasks.items():
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
  return folder


class Told:
  """Scores a continuation by how many letters it has, and writes the last prompt's number; a token is a letter."""

  def __init__(self):
    self.asked = []

  def encode(self, text):
    return text

  def pair(self, context, continuation):
    return context, continuation

  def log_likelihoods(self, pairs, budget):
    self.asked += [(context + continuation, budget) for context, continuation in pairs]
    return [
      Scored(-float(len(end)), False, Compute(len(start), 2.0 * len(start), 1, budget, 10)) for start, end in pairs
    ]

  def write(self, prompts, settings):
    self.asked += [(prompt, one["budget"]) for prompt, one in zip(prompts, settings, strict=True)]
    return [Written(" 2", Compute(10, 10, 2, 2 * one["budget"], 100)) for one in settings]


def test_choices_go_by_their_log_probability(tmp_path):
  (task,) = json_tasks.load(write(tmp_path, choices=CHOICES))
  told = Told()
  outcomes = task.answer(told, 3.0, None)
  # " Rome" and " Oslo" are as likely: the first; "aaaa" is less likely than "b", but per byte as likely; "?", not " x".
  assert [outcome.right for outcome in outcomes] == [False, False, False]
  assert [outcome.also["accuracy_per_byte"] for outcome in outcomes] == [0, 1, 0]
  assert json_tasks.continuation("a.", "«B»") == " «B»" and json_tasks.continuation("a\n", "b") == "b"
  assert told.asked[:3] == [("The capital is Rome", 3.0), ("The capital is Oslo", 3.0), ("Il aaaa", 3.0)]
  assert [text for text, _ in told.asked[4:]] == ["a?", "a x", "a y"]
  assert outcomes[0].compute == Compute(28, 56.0, 2, 6.0, 20) and outcomes[2].chance == pytest.approx(1 / 3)


def test_a_run_over_budgets_with_and_without_passages(tmp_path):
  class Book:
    withheld = 1

    def before(self, question, answer):
      return f"[{answer}]"

  class Absent:
    name, metric, about = "absent", "pass@1", {}

    def answer(self, scorer, budget, passages):
      raise Skipped("no sandbox here")

  told = Told()
  tasks = [*json_tasks.load(write(tmp_path, choices=CHOICES, exact=EXACT)), Absent()]
  found = run(tasks, told, [1.0, 4.0], Book())
  assert found["tasks"]["absent"]["skipped"] == "no sandbox here" and found["withheld"] == 1
  one, four = found["tasks"]["exact"]["by_budget"]
  assert (one["budget"], one["value"], one["chance"], four["answer_experts"]) == (1.0, 1.0, None, 4.0)
  assert one["mean_experts"] == 1.0 and one["prompt_experts"] == 1.0 and one["tokens_per_item"] == 12
  assert one["retrieved"]["value"] == 1.0 and ("[2]1 + 1 =", 4.0) in told.asked
  choices = found["tasks"]["choices"]["by_budget"][0]
  assert choices["retrieved"]["tokens_per_item"] > choices["tokens_per_item"]
  assert choices["by_kind"].keys() == {"cloze", "recall"} and choices["by_difficulty"]["10"]["items"] == 1
  assert "by_language" not in choices  # one is French, the other unknown
  first, second = found["by_kind"]
  assert (
    first["budget"] == 1.0 and second["alone"].keys() == {"cloze", "reasoning", "recall"} == first["retrieved"].keys()
  )
  assert list(first["alone"]["cloze"]["by_difficulty"]) == ["2", "10"]


def test_a_summary_by_hand():
  def outcome(right, chance=0.25, tokens=1):
    return Outcome("k", None, None, right, Compute(tokens, 2.0 * tokens, 1, 4, 7), chance, {"other": 0.5})

  found = summary([outcome(True), outcome(False), outcome(False), outcome(True, tokens=3)])
  # The standard error of four 0/1 values with mean 1/2: sqrt((4 * 1/4) / 3) / sqrt(4).
  assert found["value"] == 0.5 and found["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)
  assert found["chance"] == 0.25 and found["also"] == {"other": 0.5}
  assert found["mean_experts"] == pytest.approx((6 * 2 + 4 * 4) / 10)
  assert summary([outcome(True), dataclasses.replace(outcome(True), also={})])["also"] == {}
  assert found["flops_per_token"] == 2.8 and found["flops_per_item"] == 7 and found["tokens_per_item"] == 2.5
  assert summary([outcome(True)])["stderr"] is None and summary([outcome(True, None), outcome(True)])["chance"] is None
  assert report([outcome(True)]).keys() == found.keys() and by_kind([outcome(True)])["k"]["by_difficulty"] == {}


def test_wilson_by_hand():
  # Half of 4: the middle is 1/2; z^2 = 3.8415; half = z / (1 + z^2/4) * sqrt(1/16 + z^2/64).
  low, high = wilson_interval(2, 4)
  assert low + high == pytest.approx(1) and low == pytest.approx(0.15004, abs=1e-5)
  assert wilson_interval(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5)) and wilson_interval(0, 0) == (0, 1)


def test_a_limit_takes_items_from_all_of_a_task(tmp_path):
  items = [EXACT[0] | {"id": str(index)} for index in range(10)]
  write(tmp_path, exact=items, other=EXACT)
  (task,) = json_tasks.load(tmp_path, ["exact"], 3)
  assert [item["id"] for item in task.items] == ["0", "3", "6"] and task.metric == "exact"
  assert [len(task.items) for task in json_tasks.load(tmp_path, (), 3)] == [3, 1]


@pytest.mark.parametrize(
  ("item", "words"),
  [
    ("{", "line 2: not JSON"),
    ([], "line 2: wanted an object"),
    ({"prompt": "", "answer": "x"}, 'wanted an object with a text "prompt"'),
    ({"prompt": "x", "answer": 3}, "answer = 3: wanted a text"),
    ({"prompt": "x", "answer": 1, "choices": ["a"]}, "wanted two or more"),
    ({"prompt": "x", "answer": 2, "choices": ["a", "b"]}, "answer = 2: wanted the index of a choice, 0 to 1"),
    ({"prompt": "x", "answer": True, "choices": ["a", "b"]}, "answer = True"),
    (CHOICES[0], "with choices, or items without"),
  ],
)
def test_an_item_that_cannot_be_asked_is_a_line(tmp_path, item, words):
  text = item if isinstance(item, str) else json.dumps(item)
  (tmp_path / "exact.jsonl").write_text(json.dumps(EXACT[0]) + "\n" + text)
  with pytest.raises(UserError, match=words):
    json_tasks.load(tmp_path)


def test_a_folder_that_cannot_be_used_is_a_line(tmp_path):
  with pytest.raises(UserError, match="wanted a folder with tasks"):
    json_tasks.load(tmp_path)
  write(tmp_path, exact=EXACT)
  with pytest.raises(UserError, match="--tasks=exct: wanted one of exact .did you mean 'exact'"):
    json_tasks.load(tmp_path, ["exct"])
  (tmp_path / "manifest.json").write_text(json.dumps({"exact": {"sha256": "0" * 64, "source": "s"}}))
  with pytest.raises(UserError, match="not what manifest.json says"):
    json_tasks.load(tmp_path)
