"""Calls a function in another process, so that nothing but data comes back; runs inside the sandbox.

A program that is judged within its own process can always pass: it finds the judge's variables, returns an object that
equals everything, or ends the process with what a success looks like. Here the function and its test are in two
sandboxes with two pipes between them. A call is a line of JSON with the arguments, its answer a line with the result,
and what the test compares are its own objects: lists, tuples, dicts, sets, strings, numbers, bytes. The function's side
never has the test, nor a place where a verdict could be written. What remains is a program that knows the answers.

The sandbox has no packages: this file is read as text, put before what it runs, and imports the standard library alone.
"""

import json
import random

ANSWER = 2**22  # bytes of a result, at most
_TOLD = 200  # characters of an error
_LARGE = 1000  # bits: a longer integer goes in hexadecimal, which Python reads without a limit of digits


class Failed(Exception):
  """The function raised, or gave back what is no data."""


class Gone(Exception):
  """The function's process ended without an answer."""


def encode(value):
  """Returns what JSON can say of a value: itself, or [its kind, its parts].

  Raises:
    TypeError: it is no plain data.
  """
  if value is None or isinstance(value, bool | str | float):
    return value
  if isinstance(value, int):
    return value if value.bit_length() <= _LARGE else ["int", hex(value)]
  if isinstance(value, complex):
    return ["complex", [value.real, value.imag]]
  if isinstance(value, bytes | bytearray):
    return ["bytes", value.hex()]
  if isinstance(value, dict):
    return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
  for kind, types in (("list", list), ("tuple", tuple), ("set", (set, frozenset))):
    if isinstance(value, types):
      return [kind, [encode(item) for item in value]]
  raise TypeError(f"{type(value).__name__} is no plain data")


def decode(said):
  """Returns the value of what `encode` said."""
  if not isinstance(said, list):
    return said
  kind, parts = said
  if kind == "dict":
    return {decode(key): decode(item) for key, item in parts}
  return _MAKE[kind](parts)


_MAKE = {
  "int": lambda parts: int(parts, 16),
  "complex": lambda parts: complex(*parts),
  "bytes": bytes.fromhex,
  "list": lambda parts: [decode(item) for item in parts],
  "tuple": lambda parts: tuple(decode(item) for item in parts),
  "set": lambda parts: frozenset(decode(item) for item in parts),
}


def serve(source: str, name: str, requests: int, answers: int) -> None:
  """Runs a program and answers calls of its function `name` until no more come.

  Args:
    requests, answers: file descriptors to read and to write.
  """
  space = {"__name__": "candidate"}
  random.seed(0)
  error = None
  try:
    exec(compile(source, "candidate", "exec"), space)
    function = space[name]
  except Exception as raised:
    error = _told(raised)
  with open(requests) as calls, open(answers, "w") as out:
    for line in calls:
      if error is None:
        try:
          args, kwargs = decode(json.loads(line))
          said = {"result": encode(function(*args, **kwargs))}
        except Exception as raised:
          said = {"error": _told(raised)}
      else:
        said = {"error": error}
      out.write(json.dumps(said) + "\n")
      out.flush()


class Remote:
  """The function on the other side, to be called as if it were here; values go over and come back as copies."""

  def __init__(self, requests: int, answers: int):
    self._requests = open(requests, "w")
    self._answers = open(answers, "rb")

  def __call__(self, *args, **kwargs):
    try:
      self._requests.write(json.dumps(encode((args, kwargs))) + "\n")
      self._requests.flush()
    except BrokenPipeError:
      raise Gone from None
    line = self._answers.readline(ANSWER)
    if not line:
      raise Gone
    try:
      said = json.loads(line)
      if "error" in said:
        raise Failed(str(said["error"])[:_TOLD])
      return decode(said["result"])
    except Failed:
      raise
    except Exception:
      raise Failed("its answer cannot be read") from None


def judge(prompt: str, test: str, name: str, requests: int, answers: int) -> None:
  """Runs the test of a problem on a function elsewhere, and prints the verdict: a line of JSON.

  Args:
    prompt: the problem's own beginning of the program; the test may use what it defines.
    test: defines `check`, which is given the function.
    name: of the function.
  """
  space = {"__name__": "judge"}
  random.seed(0)
  try:
    # A function that ends with its docstring is whole: the prompt runs as it is.
    exec(compile(prompt, "prompt", "exec"), space)
    space[name] = remote = Remote(requests, answers)
    exec(compile(test, "test", "exec"), space)
    space["check"](remote)
    verdict, detail = "passed", ""
  except Gone:
    verdict, detail = "gone", ""
  except Failed as error:
    verdict, detail = "failed", str(error)
  except Exception as error:
    verdict, detail = "failed", f"the test: {_told(error)}"
  print(json.dumps({"verdict": verdict, "detail": detail}))


def _told(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"[:_TOLD]
