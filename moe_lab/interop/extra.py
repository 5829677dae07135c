"""Packages that only conversions need: the extra `hf`."""

import importlib
from types import ModuleType

from moe_lab.errors import UserError


def need(module: str) -> ModuleType:
  """Imports a module of the extra; raises UserError, which names the extra, where it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise UserError(f"{package} is not installed ({error}): wanted the extra hf, pip install 'moe_lab[hf]'") from None
