"""Packages that only conversions need: the extra `hf`."""

import importlib
from types import ModuleType

from moe_lab.errors import require


def need(module: str) -> ModuleType:
  """Imports a module of the extra; raises UserError, which names the extra, where it is not installed."""
  require(module.partition(".")[0], "a checkpoint of another format", "hf")
  return importlib.import_module(module)
