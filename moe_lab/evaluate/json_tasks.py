"""Tasks of a folder of JSON lines: multiple choice, and short answers that can be checked.

A line is an item: {"id", "kind", "difficulty", "language", "prompt", "answer"}, or with "choices", a list of which
"answer" is then the index. Kind, difficulty and language may be missing. A manifest.json beside them, where there is
one, tells each file's hash.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moe_lab.errors import UserError, did_you_mean
from moe_lab.evaluate.offline import is_right
from moe_lab.evaluate.outcomes import Outcome
from moe_lab.evaluate.passages import Passages
from moe_lab.evaluate.scoring import Scorer

SPARE_TOKENS = 8  # that a generated answer may be longer than the right one; it ends with its line
_CLOSING = tuple(".,;:!?)]}…")  # punctuation that stands close to what is before it


@dataclasses.dataclass(frozen=True)
class JsonTask:
  """The items of one file.

  Attributes:
    name: of the file, without its ending.
    metric: accuracy (of choices, by their log-probabilities) | exact (of generated answers).
    about: file, sha256 and what the manifest says.
    items: checked.
  """

  name: str
  metric: str
  about: dict
  items: Sequence[dict]

  def answer(self, scorer: Scorer, budget: float, passages: Passages | None) -> list[Outcome]:
    """Asks every item; see `suite.Task`."""
    prompts = [
      (passages.before(item["prompt"], _answer(item)) if passages else "") + item["prompt"] for item in self.items
    ]
    ask = self._choose if self.metric == "accuracy" else self._write
    return ask(scorer, budget, prompts)

  def _choose(self, scorer: Scorer, budget: float, prompts: Sequence[str]) -> list[Outcome]:
    pairs = [
      scorer.pair(prompt, continuation(prompt, choice))
      for prompt, item in zip(prompts, self.items, strict=True)
      for choice in item["choices"]
    ]
    scores = iter(scorer.log_likelihoods(pairs, budget))
    outcomes = []
    for item in self.items:
      of_item = [next(scores) for _ in item["choices"]]
      by_sum = [scored.log_prob for scored in of_item]
      by_byte = [value / len(choice.encode()) for value, choice in zip(by_sum, item["choices"], strict=True)]
      right, per_byte = (values.index(max(values)) == item["answer"] for values in (by_sum, by_byte))
      compute = sum((scored.compute for scored in of_item[1:]), of_item[0].compute)
      outcomes.append(_outcome(item, right, compute, 1 / len(by_sum), {"accuracy_per_byte": float(per_byte)}))
    return outcomes

  def _write(self, scorer: Scorer, budget: float, prompts: Sequence[str]) -> list[Outcome]:
    settings = [
      {"max_tokens": len(scorer.encode(item["answer"])) + SPARE_TOKENS, "stop": ("\n",), "budget": budget}
      for item in self.items
    ]
    written = scorer.write([scorer.encode(prompt) for prompt in prompts], settings)
    return [
      _outcome(item, is_right(item, one.text), one.compute, None, {})
      for item, one in zip(self.items, written, strict=True)
    ]


def _outcome(item: dict, right: bool, compute, chance: float | None, also: dict) -> Outcome:
  return Outcome(
    item.get("kind") or "other", item.get("difficulty"), item.get("language"), right, compute, chance, also
  )


def _answer(item: dict) -> str:
  return item["choices"][item["answer"]] if "choices" in item else item["answer"]


def continuation(prompt: str, choice: str) -> str:
  """Returns a choice as it goes on from the prompt: behind a space, unless there is one, or none belongs there."""
  return choice if prompt[-1:].isspace() or choice.startswith((" ", *_CLOSING)) else f" {choice}"


def load(folder: Path, names: Sequence[str] = (), limit: int | None = None) -> list[JsonTask]:
  """Returns the tasks of a folder.

  Args:
    folder: with a .jsonl file for each task.
    names: which tasks; none: all.
    limit: items of each task, taken evenly from all of it; None: all.

  Raises:
    UserError: names the file and the line that cannot be used.
  """
  files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
  if not files:
    raise UserError(f"{folder}: wanted a folder with tasks (.jsonl) in it")
  for name in names:
    if name not in files:
      raise UserError(f"--tasks={name}: wanted one of {', '.join(files)}{did_you_mean(name, files)}")
  manifest = _manifest(folder / "manifest.json")
  return [_load(files[name], manifest.get(name, {}), limit) for name in names or files]


def _load(path: Path, entry: dict, limit: int | None) -> JsonTask:
  try:
    content = path.read_bytes()
    lines = content.decode("utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: wanted a readable UTF-8 file ({error})") from None
  digest = hashlib.sha256(content).hexdigest()
  if entry.get("sha256", digest) != digest:
    raise UserError(f"{path}: it is not what manifest.json says (sha256); wanted the file as it was written")
  items = [_item(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
  if not items:
    raise UserError(f"{path}: wanted at least one item")
  if len({"choices" in item for item in items}) > 1:
    raise UserError(f"{path}: wanted items with choices, or items without; not both")
  if limit is not None and limit < len(items):
    items = [items[index * len(items) // limit] for index in range(limit)]
  metric = "accuracy" if "choices" in items[0] else "exact"
  about = {name: value for name, value in entry.items() if name == "source"}
  return JsonTask(path.stem, metric, about | {"file": path.name, "sha256": digest}, items)


def _item(line: str, place: str) -> dict:
  try:
    item = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{place}: not JSON ({error})") from None
  if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"]:
    raise UserError(f'{place}: wanted an object with a text "prompt"')
  answer, choices = item.get("answer"), item.get("choices")
  if "choices" not in item:
    if not isinstance(answer, str) or not answer:
      raise UserError(f'{place}: answer = {answer!r}: wanted a text; or "choices", and the index of the right one')
    return item
  if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
    raise UserError(f"{place}: choices = {choices!r}: wanted two or more texts")
  if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
    raise UserError(f"{place}: answer = {answer!r}: wanted the index of a choice, 0 to {len(choices) - 1}")
  return item


def _manifest(path: Path) -> dict[str, dict]:
  """Returns what a manifest says of each task; {} where there is none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: wanted a readable JSON file ({error})") from None
  if not isinstance(found, dict):
    raise UserError(f"{path}: wanted an object")
  return {name: entry for name, entry in found.items() if isinstance(entry, dict)}
