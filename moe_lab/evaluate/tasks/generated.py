"""Short questions that need nothing but what the prompt says, for models too small for anything else.

Each is a run of lines, of which the last one is to be completed; the lines before show how it is done. Difficulty is
how much there is to hold or to work: facts, words, terms, numbers, steps.
"""

import random
from collections.abc import Callable, Iterator

from moe_lab.evaluate.tasks.items import exact

NOUNS = (
  "apple river stone lamp horse cloud table knife bread tower garden window silver paper winter candle bridge forest "
  "mirror pencil rabbit basket hammer island kettle ladder market needle orange pillow"
).split()
COLOURS = "red blue green black white grey brown pink".split()
_FIRST, _MIDDLE, _LAST = "b d f g k l m n p r s t v z".split(), "a e i o u".split(), "b d g k l m n r s t".split()

# How much of it there is, by difficulty.
_SIZES = {
  "recall_fact": (2, 5, 12),
  "recall_copy": (2, 4, 8),
  "recall_table": (3, 6, 12),
  "translation_words": (1, 2, 4),
  "arithmetic_chain": (2, 3, 5),
  "reasoning_sort": (3, 5, 8),
  "reasoning_steps": (1, 2, 4),
}


def names() -> list[str]:
  """Returns the names of the tasks."""
  return list(_SIZES)


def candidates(task: str, rng: random.Random) -> Iterator[dict]:
  """Yields items of a task without end, each difficulty in turn."""
  kind = task.partition("_")[0]
  while True:
    for place, size in enumerate(_SIZES[task]):
      prompt, answer = _MAKE[task](rng, size)
      yield exact(kind, str(place + 1), "en", prompt, answer)


def _fact(rng: random.Random, size: int) -> tuple[str, str]:
  nouns = rng.sample(NOUNS, size)
  codes = [str(code) for code in rng.sample(range(1000, 10000), size)]
  lines = [f"The code of the {noun} is {code}." for noun, code in zip(nouns, codes, strict=True)]
  asked = rng.randrange(size)
  return "\n".join([*lines, f"The code of the {nouns[asked]} is"]), codes[asked]


def _copy(rng: random.Random, size: int) -> tuple[str, str]:
  return _shown(rng, lambda: ((words := " ".join(rng.sample(NOUNS, size))), words), "Copy: {} ->")


def _table(rng: random.Random, size: int) -> tuple[str, str]:
  nouns, numbers = rng.sample(NOUNS, size), rng.sample(range(10, 100), size)
  rows = [(noun, rng.choice(COLOURS), str(number)) for noun, number in zip(nouns, numbers, strict=True)]
  asked = rng.sample(range(size), 3)
  column = rng.choice((1, 2))
  lines = ["thing | colour | number", *(" | ".join(row) for row in rows), ""]
  lines += [f"The {('colour', 'number')[column - 1]} of {rows[row][0]}: {rows[row][column]}" for row in asked]
  prompt, _, answer = "\n".join(lines).rpartition(" ")
  return prompt, answer


def _words(rng: random.Random, size: int) -> tuple[str, str]:
  nouns = rng.sample(NOUNS, 5)
  foreign: list[str] = []
  while len(foreign) < len(nouns):
    word = "".join(map(rng.choice, (_FIRST, _MIDDLE, _LAST, _MIDDLE)))
    foreign += [word] if word not in foreign else []
  lexicon = dict(zip(nouns, foreign, strict=True))

  def pair() -> tuple[str, str]:
    words = rng.sample(nouns, size)
    return " ".join(words), " ".join(lexicon[word] for word in words)

  told = "\n".join(f"{noun} = {word}" for noun, word in lexicon.items())
  prompt, answer = _shown(rng, pair, "{} =")
  return f"{told}\n\n{prompt}", answer


def _chain(rng: random.Random, size: int) -> tuple[str, str]:
  def pair() -> tuple[str, str]:
    total = rng.randint(1, 20)
    terms = [str(total)]
    for _ in range(size - 1):
      term = rng.randint(1, 20)
      minus = term <= total and rng.random() < 0.5  # no result is negative
      terms += ["-" if minus else "+", str(term)]
      total += -term if minus else term
    return " ".join(terms), str(total)

  return _shown(rng, pair, "{} =")


def _sort(rng: random.Random, size: int) -> tuple[str, str]:
  def pair() -> tuple[str, str]:
    numbers = rng.sample(range(1, 100), size)
    return " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))

  return _shown(rng, pair, "Sort: {} ->")


def _steps(rng: random.Random, size: int) -> tuple[str, str]:
  def pair() -> tuple[str, str]:
    letters = rng.sample("abcdefghkmnpqrstuvwxyz", size + 1)
    value = rng.randint(1, 9)
    told = [f"{letters[0]} = {value}"]
    for before, letter in zip(letters, letters[1:], strict=False):
      step = rng.randint(1, 9)
      told.append(f"{letter} = {before} + {step}")
      value += step
    return f"{'; '.join(told)}; {letters[-1]}", str(value)

  return _shown(rng, pair, "{} is")


def _shown(rng: random.Random, pair: Callable[[], tuple[str, str]], form: str) -> tuple[str, str]:
  """Returns two lines that are whole and one to be completed, with the completion."""
  pairs = [pair()]
  while len(pairs) < 3:
    more = pair()
    pairs += [more] if more not in pairs else []
  lines = [f"{form.format(question)} {answer}" for question, answer in pairs[:-1]]
  question, answer = pairs[-1]
  return "\n".join([*lines, form.format(question)]), answer


_MAKE = {
  "recall_fact": _fact,
  "recall_copy": _copy,
  "recall_table": _table,
  "translation_words": _words,
  "arithmetic_chain": _chain,
  "reasoning_sort": _sort,
  "reasoning_steps": _steps,
}
