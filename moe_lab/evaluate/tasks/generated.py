"""Short questions that need nothing but what the prompt says, for models too small for anything else.

Each is a run of lines, of which the last one is to be completed; the lines before show how it is done. Difficulty is
how much there is to hold or to work: facts, words, terms, numbers, steps. Every task is there twice: the answer is to
be written, or to be told from three that nearly do (`..._of_four`), which says something even of a model that writes
none right.
"""

import random
from collections.abc import Callable, Iterable, Iterator

from moe_lab.evaluate.tasks.items import CHOICES, choice, exact

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


_OF_FOUR = "_of_four"

_Question = tuple[str, str, Iterable[str]]  # prompt, answer, wrong answers: enough of them, the best first


def names() -> list[str]:
  """Returns the names of the tasks."""
  return [name + ending for name in _SIZES for ending in ("", _OF_FOUR)]


def candidates(task: str, rng: random.Random) -> Iterator[dict]:
  """Yields items of a task without end, each difficulty in turn."""
  kind, name = task.partition("_")[0], task.removesuffix(_OF_FOUR)
  while True:
    for place, size in enumerate(_SIZES[name]):
      prompt, answer, wrong = _MAKE[name](rng, size)
      if name == task:
        yield exact(kind, str(place + 1), "en", prompt, answer)
      else:
        yield choice(kind, str(place + 1), "en", prompt, answer, _few(wrong, answer))


def _fact(rng: random.Random, size: int) -> _Question:
  nouns = rng.sample(NOUNS, size)
  codes = [str(code) for code in rng.sample(range(1000, 10000), size + CHOICES)]
  lines = [f"The code of the {noun} is {code}." for noun, code in zip(nouns, codes, strict=False)]
  asked = rng.randrange(size)
  return (
    "\n".join([*lines, f"The code of the {nouns[asked]} is"]),
    codes[asked],
    [*rng.sample(codes[:size], size), *codes[size:]],
  )


def _copy(rng: random.Random, size: int) -> _Question:
  prompt, answer = _shown(rng, lambda: ((words := " ".join(rng.sample(NOUNS, size))), words), "Copy: {} ->")
  return prompt, answer, _replaced(rng, answer, NOUNS)


def _table(rng: random.Random, size: int) -> _Question:
  nouns = rng.sample(NOUNS, size)
  numbers = [str(number) for number in rng.sample(range(10, 100), size + CHOICES)]
  colours = [rng.choice(COLOURS) for _ in nouns]
  columns = {"colour": [*colours, *rng.sample(COLOURS, CHOICES)], "number": numbers}
  column = rng.choice(list(columns))
  asked = rng.sample(range(size), 3)
  lines = ["thing | colour | number"]
  lines += [" | ".join(row) for row in zip(nouns, colours, numbers, strict=False)]
  lines += ["", *(f"The {column} of {nouns[row]}: {columns[column][row]}" for row in asked)]
  prompt, _, answer = "\n".join(lines).rpartition(" ")
  told, others = columns[column][:size], columns[column][size:]
  return prompt, answer, [*rng.sample(told, size), *others]


def _words(rng: random.Random, size: int) -> _Question:
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
  return f"{told}\n\n{prompt}", answer, _replaced(rng, answer, foreign)


def _chain(rng: random.Random, size: int) -> _Question:
  def pair() -> tuple[str, str]:
    total = rng.randint(1, 20)
    terms = [str(total)]
    for _ in range(size - 1):
      term = rng.randint(1, 20)
      minus = term <= total and rng.random() < 0.5  # no result is negative
      terms += ["-" if minus else "+", str(term)]
      total += -term if minus else term
    return " ".join(terms), str(total)

  prompt, answer = _shown(rng, pair, "{} =")
  return prompt, answer, _near(rng, answer)


def _sort(rng: random.Random, size: int) -> _Question:
  def pair() -> tuple[str, str]:
    numbers = rng.sample(range(1, 100), size)
    return " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))

  prompt, answer = _shown(rng, pair, "Sort: {} ->")
  return prompt, answer, _shuffled(rng, answer)


def _steps(rng: random.Random, size: int) -> _Question:
  def pair() -> tuple[str, str]:
    letters = rng.sample("abcdefghkmnpqrstuvwxyz", size + 1)
    value = rng.randint(1, 9)
    told = [f"{letters[0]} = {value}"]
    for before, letter in zip(letters, letters[1:], strict=False):
      step = rng.randint(1, 9)
      told.append(f"{letter} = {before} + {step}")
      value += step
    return f"{'; '.join(told)}; {letters[-1]}", str(value)

  prompt, answer = _shown(rng, pair, "{} is")
  return prompt, answer, _near(rng, answer)


def _shown(rng: random.Random, pair: Callable[[], tuple[str, str]], form: str) -> tuple[str, str]:
  """Returns two lines that are whole and one to be completed, with the completion."""
  pairs = [pair()]
  while len(pairs) < 3:
    more = pair()
    pairs += [more] if more not in pairs else []
  lines = [f"{form.format(question)} {answer}" for question, answer in pairs[:-1]]
  question, answer = pairs[-1]
  return "\n".join([*lines, form.format(question)]), answer


def _few(wrong: Iterable[str], answer: str) -> list[str]:
  """Returns the first three different wrong answers."""
  found: list[str] = []
  for other in wrong:
    if other != answer and other not in found:
      found.append(other)
    if len(found) == CHOICES - 1:
      break
  return found


def _replaced(rng: random.Random, answer: str, words: list[str]) -> Iterator[str]:
  """Yields the answer with another word in one place, without end."""
  right = answer.split()
  while True:
    place = rng.randrange(len(right))
    yield " ".join([*right[:place], rng.choice(words), *right[place + 1 :]])


def _near(rng: random.Random, answer: str) -> list[str]:
  """Returns numbers near the answer, none negative, the answer's rank among them by chance."""
  first = max(int(answer) - rng.randrange(CHOICES), 0)
  return [str(number) for number in range(first, first + CHOICES)]


def _shuffled(rng: random.Random, answer: str) -> Iterator[str]:
  """Yields the answer with two neighbours changed over or, once in a while, in any order, without end."""
  while True:
    numbers = answer.split()
    place = rng.randrange(len(numbers) - 1)
    numbers[place : place + 2] = numbers[place + 1], numbers[place]
    yield " ".join(numbers if rng.random() < 0.5 else rng.sample(numbers, len(numbers)))


_MAKE = {
  "recall_fact": _fact,
  "recall_copy": _copy,
  "recall_table": _table,
  "translation_words": _words,
  "arithmetic_chain": _chain,
  "reasoning_sort": _sort,
  "reasoning_steps": _steps,
}
