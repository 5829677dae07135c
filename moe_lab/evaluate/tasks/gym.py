"""Ten generators of reasoning-gym (arXiv 2505.24760), in three grades each by their own parameters.

A prompt shows one worked question of the same grade before the one that is asked. Right is what the generator's own
scorer gives full marks.
"""

import functools
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from moe_lab.errors import require
from moe_lab.evaluate.tasks.items import exact

PREFIX = "gym_"
_APART = 10**6
_TRIES = 5  # questions drawn for each that is wanted: the easiest grades repeat themselves

# Generator -> kind, and parameters of difficulty 1, 2, 3.
_GRADES: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
  "chain_sum": ("arithmetic", (
    {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2},
    {"min_terms": 5, "max_terms": 6, "min_digits": 3, "max_digits": 4},
  )),
  "products": ("arithmetic", (
    {"min_digits": 1, "max_digits": 2}, {"min_digits": 2, "max_digits": 3}, {"min_digits": 4, "max_digits": 5},
  )),
  "leg_counting": ("arithmetic", (
    {"min_animals": 1, "max_animals": 2, "max_instances": 5},
    {"min_animals": 3, "max_animals": 4, "max_instances": 10},
    {"min_animals": 6, "max_animals": 8, "max_instances": 15},
  )),
  "number_sequence": ("reasoning", (
    {"max_complexity": 1, "max_value": 20, "min_value": 0}, {"max_complexity": 2}, {"max_complexity": 3},
  )),
  "simple_equations": ("reasoning", (
    {"min_terms": 2, "max_terms": 2, "max_value": 10},
    {"min_terms": 3, "max_terms": 3, "max_value": 50},
    {"min_terms": 4, "max_terms": 4, "max_value": 100},
  )),
  "family_relationships": ("reasoning", (
    {"min_family_size": 3, "max_family_size": 4},
    {"min_family_size": 5, "max_family_size": 6},
    {"min_family_size": 7, "max_family_size": 8},
  )),
  "knights_knaves": ("reasoning", ({"n_people": 2}, {"n_people": 3}, {"n_people": 4})),
  "letter_counting": ("reasoning", (
    {"min_words": 2, "max_words": 3}, {"min_words": 5, "max_words": 8}, {"min_words": 12, "max_words": 15},
  )),
  "spell_backward": ("reasoning", (
    {"min_word_len": 3, "max_word_len": 4},
    {"min_word_len": 5, "max_word_len": 6},
    {"min_word_len": 8, "max_word_len": 10},
  )),
  "needle_haystack": ("recall", (
    {"min_num_statements": 3, "max_num_statements": 5},
    {"min_num_statements": 8, "max_num_statements": 10},
    {"min_num_statements": 18, "max_num_statements": 20},
  )),
}  # fmt: skip


def names() -> list[str]:
  """Returns the names of the tasks."""
  return [PREFIX + name for name in _GRADES]


def version() -> str:
  """Returns the installed version of reasoning-gym; UserError where there is none."""
  _gym()
  return importlib.metadata.version("reasoning-gym")


def candidates(task: str, seed: int, number: int) -> Iterator[dict]:
  """Yields items of a task, at most `number` of each difficulty; no question comes twice."""
  name = task.removeprefix(PREFIX)
  kind, grades = _GRADES[name]
  seen = set()
  for place, parameters in enumerate(grades):
    # A question's own seed is the generator's plus its number: the grades are far apart.
    of_grade = (seed * len(grades) + place) * _APART
    questions = iter(_gym().create_dataset(name, seed=of_grade, size=_APART, **parameters))
    shown = next(questions)
    seen.add(shown["question"])
    new = (asked for asked in itertools.islice(questions, _TRIES * number) if asked["question"] not in seen)
    for asked in itertools.islice(new, number):
      seen.add(asked["question"])
      prompt = f"{_posed(shown)} {shown['answer'].strip()}\n\n{_posed(asked)}"
      yield exact(kind, str(place + 1), "en", prompt, asked["answer"].strip())


def is_right(item: dict, text: str) -> bool:
  """Returns whether the scorer of the item's generator finds a text wholly right."""
  task, _, _ = item["id"].rpartition("-")
  return _scorer(task.removeprefix(PREFIX))(answer=text, entry={"answer": item["answer"]}) == 1.0


def _posed(question: dict) -> str:
  return f"Question: {question['question'].strip()}\nAnswer:"


@functools.cache
def _scorer(name: str) -> Callable[..., float]:
  return _gym().get_score_answer_fn(name)


def _gym() -> ModuleType:
  require("reasoning_gym", f"the suite's tasks {PREFIX}*", "eval")
  return importlib.import_module("reasoning_gym")
