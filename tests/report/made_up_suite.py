"""A suite's record as `experiments.evaluate` writes it, of a model that is made up."""

import random

from moe_lab.evaluate.compute import Compute
from moe_lab.evaluate.outcomes import Outcome
from moe_lab.evaluate.suite import Skipped, run


class MadeUp:
  """A task whose items are right by chance: the more often the larger the budget, and less the harder they are."""

  metric = "accuracy"

  def __init__(self, name, kinds, chance):
    self.name, self.kinds, self.chance = name, kinds, chance
    self.about = {"source": "<made up>", "sha256": "ab" * 32}

  def answer(self, scorer, budget, passages):
    rng, outcomes = random.Random(f"{self.name}{budget}{passages is None}"), []
    for index in range(96):
      kind, grade = self.kinds[index % len(self.kinds)], 1 + index // 3 % 4
      experts = budget * (0.6 + 0.2 * grade) if kind == "reasoning" else budget * 0.7
      right = rng.random() < 0.3 + 0.12 * budget - 0.05 * grade + (0.1 if passages else 0)
      compute = Compute(60, 60 * budget, 5, 5 * experts, (2e7 if passages else 8e6) * (1 + budget))
      language = ("en", "fr")[index % 2]
      outcomes.append(Outcome(kind, grade, language, right, compute, self.chance, {"accuracy_per_byte": 0.5}))
    return outcomes


class Absent(MadeUp):
  def answer(self, scorer, budget, passages):
    raise Skipped("no <sandbox> here")


class Book:
  withheld = 3


def made_up_suite(name="small", budgets=(1.0, 2.0, 4.0), retrieve=True, step=600):
  """Returns the record."""
  tasks = [
    MadeUp("cloze", ["recall", "translation"], 0.25),
    MadeUp("<sums>", ["reasoning"], None),
    Absent("humaneval", [], None),
  ]
  return {
    "suite": name,
    "step": step,
    "method": "dynamic",
    "trained_budget": 2.0,
    "budgets": list(budgets),
    "limit": None,
    "context": 2048,
    "retrieve": {"folder": "<texts>", "passages": 1234, "shown": 3} if retrieve else None,
    "command": "python -m <it>",
    "code": "ab12",
  } | run(tasks, None, budgets, Book() if retrieve else None)
