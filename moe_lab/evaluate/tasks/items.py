"""An item of a task, and how a task is put together from more candidates than it needs."""

import random
from collections.abc import Iterable, Sequence

CHOICES = 4
DIFFICULTIES = ("1", "2", "3")


def exact(kind: str, difficulty: str, language: str, prompt: str, answer: str) -> dict:
  """Returns an item whose answer is a short text, on one line."""
  assert answer and answer == answer.strip() and "\n" not in answer, answer
  return {"kind": kind, "difficulty": difficulty, "language": language, "prompt": prompt, "answer": answer}


def choice(kind: str, difficulty: str, language: str, prompt: str, right: str, wrong: Sequence[str]) -> dict:
  """Returns an item of multiple choice, the right one first; `numbered` deals out its place."""
  choices = [right, *wrong]
  assert len(set(choices)) == CHOICES, choices
  return {
    "kind": kind, "difficulty": difficulty, "language": language, "prompt": prompt, "choices": choices, "answer": 0,
  }  # fmt: skip


def chosen(candidates: Iterable[dict], number: int, rng: random.Random) -> list[dict]:
  """Returns at most `number` of the candidates, a third of each difficulty as far as there are so many."""
  by_difficulty = {difficulty: [] for difficulty in DIFFICULTIES}
  seen = set()
  for item in candidates:
    if item["prompt"] not in seen:
      seen.add(item["prompt"])
      by_difficulty[item["difficulty"]].append(item)
  found = []
  for place, items in enumerate(by_difficulty.values()):
    rng.shuffle(items)
    found += items[: share(number, place)]
  return found


def share(number: int, place: int) -> int:
  """Returns how many of `number` items are of the difficulty at a place, 0 to 2."""
  return (number + place) // len(DIFFICULTIES)


def numbered(task: str, items: Sequence[dict], rng: random.Random) -> list[dict]:
  """Returns the items in an order by chance, with an id each and right choices as often at each place."""
  items = list(items)
  rng.shuffle(items)
  places = [number % CHOICES for number in range(len(items))]
  rng.shuffle(places)
  done = []
  for number, (item, place) in enumerate(zip(items, places, strict=True)):
    item = {"id": f"{task}-{number:04d}"} | item
    if "choices" in item:
      right, *wrong = item["choices"]
      rng.shuffle(wrong)
      item |= {"choices": [*wrong[:place], right, *wrong[place:]], "answer": place}
    done.append(item)
  return done
