"""What the fuzz tests share: how many examples, what counts as an answer, and bytes that were valid once."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lab.errors import UserError, visible


def examples(quick: int, slow: int):
  """Parametrises a test by `count`: few examples, the same each time, and many more under `slow`."""
  return pytest.mark.parametrize("count", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def each(strategy: st.SearchStrategy, count: int, check: Callable[[object], None]) -> None:
  """Runs `check` on examples; a failing one is reported in its smallest form."""
  quiet = settings(
    max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
  )
  quiet(given(strategy)(lambda example: check(example)))()


@contextlib.contextmanager
def answered(*names: str):
  """Within it a UserError is an answer if it is one line that a terminal may have and holds one of the names."""
  try:
    yield
  except UserError as error:
    line = str(error)
    assert line and len(line.splitlines()) == 1 and visible(line) == line, line
    assert not names or any(name in line for name in names), line


_ODD = ["", "\x1b[2J", "a\nb", "\ud800", "nan", "1e999", "../x"]
_TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(
  ["", "\x1b[2J", "a\nb", "\ud800", "nan", "1e999", "../x"]
)
_NUMBERS = (
  st.integers()
  | st.floats()
  | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, 5e-324, float("nan"), float("inf")])
)
VALUES = st.recursive(
  st.none() | st.booleans() | _NUMBERS | _TEXT,
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=3),
  max_leaves=8,
)


@st.composite
def mutated(draw, valid: Sequence[bytes]) -> bytes:
  """Bytes of one of `valid` with a few changes: set, deleted, inserted, repeated, cut off."""
  data = bytearray(draw(st.sampled_from(list(valid))))
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    length = draw(st.integers(1, 8))
    match draw(st.sampled_from(["set", "delete", "insert", "repeat", "cut", "swap"])):
      case "set":
        data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
      case "delete":
        del data[at : at + length]
      case "insert":
        data[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 8, b"[" * 5000, b'"', b"1" * 5000]))
      case "repeat":
        data[at:at] = data[at : at + length * 4]
      case "cut":
        del data[at:]
      case "swap":
        other = draw(st.integers(0, max(len(data) - 1, 0)))
        if data:
          data[at], data[other] = data[other], data[at]
  return bytes(data)
