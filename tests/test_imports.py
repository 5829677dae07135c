"""Holds the code against the table of who may import whom.

Imports run downward only, so that a part can be read, tested and replaced
without what is built on it.
"""

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_MAX_LINES = 450

_BASE = ["types", "errors", "strict_json", "config"]
_OUTSIDE = ["data", "io", "interop"]  # files and formats: they know the base and each other, and no model
_LEVELS = [  # from the bottom; a package imports from the levels below its own
  _BASE,
  ["ops", "sharding"],
  ["routing"],
  ["nn"],
  ["infer"],
  ["evaluate"],
  ["train", "adapt"],
  ["serve", "launch", "preflight", "report"],
  ["benchmarks"],
  ["experiments"],
]
_PEERS = [_BASE, _OUTSIDE, ["ops", "sharding"], ["train", "adapt"]]  # and these from each other
_FIRST_WITH_OUTSIDE = 4  # the level from which on data, io and interop are at hand: infer


def _allowed() -> dict[str, set[str]]:
  """Returns package -> the packages that it may import."""
  allowed = {package: set(_BASE) for package in _OUTSIDE}
  for number, level in enumerate(_LEVELS):
    below = {package for lower in _LEVELS[:number] for package in lower}
    outside = set(_OUTSIDE) if number >= _FIRST_WITH_OUTSIDE else set()
    allowed |= {package: below | outside for package in level}
  for peers in _PEERS:
    for package in peers:
      allowed[package] |= set(peers)
  return {package: others | {package} for package, others in allowed.items()}


_ALLOWED = _allowed()


def _package(module: str) -> str | None:
  """Returns the place of a dotted module in the table: "routing" of moe_lab.routing.base; None if it is not ours."""
  top, _, rest = module.partition(".")
  if top == "moe_lab":
    return rest.partition(".")[0]
  return top if top in ("experiments", "benchmarks") else None


def _imports(nodes, path: str) -> list[str]:
  """Returns the dotted names that import statements name, `from a import b` as a.b."""
  found = []
  for node in nodes:
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      here = Path(path).with_suffix("").parts[: -node.level] if node.level else ()
      module = ".".join([*here, *([node.module] if node.module else [])])
      found += [f"{module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Attribute) and node.attr == "linen" and isinstance(node.value, ast.Name):
      found.append(f"{node.value.id}.linen")
  return found


def _under(module: str, package: str) -> bool:
  return (module + ".").startswith(package + ".")


def violations(path: str, source: str) -> list[str]:
  """Returns what a file at `path` (from the root, with /) does against the rules."""
  found = []
  tree = ast.parse(source)
  me = _package(".".join(Path(path).with_suffix("").parts))
  if me == "__init__":  # moe_lab/__init__.py, which everything loads
    me = "types"
  if me not in _ALLOWED:
    return [f"{path}: {me} has no place in the table"]
  for module in _imports(ast.walk(tree), path):
    package = _package(module)
    if package and package not in _ALLOWED[me]:
      found.append(f"{path}: {me} imports {module}")
    if _under(module, "flax.linen") and me != "nn":
      found.append(f"{path}: flax.linen outside moe_lab/nn")
    if _under(module, "ml_collections") and me != "config":
      found.append(f"{path}: ml_collections outside moe_lab/config")
    if me in _BASE and any(_under(module, heavy) for heavy in ("jax", "flax", "orbax")):
      found.append(f"{path}: {module} in the base, which has to load at once")
  if Path(path).parent.as_posix() == "experiments":
    # A program answers --help and a mistake before jax is loaded, and sets jax's environment.
    for module in _imports(_at_import(tree), path):
      if _under(module, "jax") or _package(module) not in (None, "experiments", *_BASE):
        found.append(f"{path}: {module} at the top: import it in main")
  if source.count("\n") > _MAX_LINES:
    found.append(f"{path}: {source.count(chr(10))} lines, more than {_MAX_LINES}: is it still one idea?")
  if Path(path).name == "utils.py":
    found.append(f"{path}: utils.py names no idea")
  return found


def _at_import(node: ast.AST):
  """Yields what runs when a module is imported: everything but the bodies of functions."""
  for child in ast.iter_child_nodes(node):
    yield child
    if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      yield from _at_import(child)


_FILES = sorted(
  path.relative_to(_ROOT).as_posix()
  for top in ("moe_lab", "experiments", "benchmarks")
  for path in (_ROOT / top).rglob("*.py")
)


def test_there_is_something_to_check():
  assert {"moe_lab/types.py", "moe_lab/config/resolve.py"} <= set(_FILES)


@pytest.mark.parametrize("path", _FILES)
def test_imports_run_downward(path):
  assert violations(path, (_ROOT / path).read_text()) == []


@pytest.mark.parametrize(
  "path, source, count",
  [
    ("moe_lab/ops/a.py", "from moe_lab.routing import base", 1),
    ("moe_lab/ops/a.py", "import moe_lab.routing.base as b", 1),
    ("moe_lab/ops/a.py", "from moe_lab import types, nn", 1),
    ("moe_lab/ops/a.py", "from ..nn import moe", 1),
    ("moe_lab/ops/a.py", "from .. import nn", 1),
    ("moe_lab/ops/a.py", "from . import alibi", 0),
    ("moe_lab/ops/a.py", "def f():\n  from moe_lab.train import loop", 1),
    ("moe_lab/ops/a.py", "import flax.linen as nn", 1),
    ("moe_lab/ops/a.py", "from flax import linen", 1),
    ("moe_lab/ops/a.py", "from flax.linen import Dense", 1),
    ("moe_lab/ops/a.py", "import flax\nx = flax.linen.Dense", 1),
    ("moe_lab/ops/a.py", "from flax import struct", 0),
    ("moe_lab/ops/a.py", "from ml_collections import ConfigDict", 1),
    ("moe_lab/nn/a.py", "from moe_lab.data import loader", 1),
    ("moe_lab/data/a.py", "from moe_lab.ops import alibi", 1),
    ("moe_lab/data/a.py", "from moe_lab.io import files\nfrom moe_lab.types import Batch", 0),
    ("moe_lab/infer/a.py", "from moe_lab.evaluate import perplexity", 1),
    ("moe_lab/evaluate/a.py", "from moe_lab.infer import engine\nfrom moe_lab.data import loader", 0),
    ("moe_lab/evaluate/a.py", "from moe_lab.train import loop", 1),
    ("moe_lab/train/a.py", "from moe_lab.evaluate import perplexity\nfrom moe_lab.io import run", 0),
    ("moe_lab/train/a.py", "from moe_lab.report import page", 1),
    ("moe_lab/serve/a.py", "from moe_lab.report import page", 1),
    ("moe_lab/report/a.py", "from experiments import train", 1),
    ("moe_lab/report/a.py", "from moe_lab.io import run", 0),
    ("moe_lab/config/a.py", "from moe_lab.io import run", 1),
    ("moe_lab/config/a.py", "import jax.numpy", 1),
    ("moe_lab/config/a.py", "from ml_collections import ConfigDict\nfrom moe_lab.errors import UserError", 0),
    ("moe_lab/__init__.py", "from moe_lab import nn", 1),
    ("moe_lab/stuff/a.py", "x = 1", 1),
    ("moe_lab/ops/utils.py", "x = 1", 1),
    ("moe_lab/ops/a.py", "x = 1\n" * (_MAX_LINES + 1), 1),
    ("experiments/a.py", "import jax", 1),
    ("experiments/a.py", "if True:\n  from moe_lab.train import loop", 1),
    ("experiments/a.py", "from moe_lab.config import program\ndef main():\n  from moe_lab.report import page", 0),
    ("experiments/topic/a.py", "import jax", 0),
  ],
)
def test_the_checker_sees_a_violation(path, source, count):
  assert len(violations(path, source)) == count, violations(path, source)
