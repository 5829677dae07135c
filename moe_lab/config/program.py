"""The entry that every program in experiments/ shares.

    def main(config: Config, workdir: Path) -> dict:
      from moe_lab.train import loop  # what needs jax is imported here, so --help and mistakes answer at once
      ...

    if __name__ == "__main__":
      program.run(main)

The last line on stdout is main's result, one JSON object; everything else goes
to stderr. Exit 0 done, 1 failed, 2 bad usage or config, 130 interrupted, 75
preempted (SIGTERM): it may simply be started again. A main that has something
to save hears SIGTERM itself, and raises SystemExit(75) when that is done.
"""

import ctypes
import inspect
import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags as absl_flags
from absl import logging as absl_logging

from moe_lab.config import command_line
from moe_lab.errors import PREEMPTED, UserError

absl_flags.disclaim_key_flags()


def run(
  main: Callable[..., dict | None], flags: absl_flags.FlagValues | None = None, *, one_arena: bool = True
) -> None:
  """Runs a program, and exits.

  Args:
    main: takes `config` (a schema.Config), `workdir` (a Path), both or neither.
      Its parameters decide which flags the program has; one with a default is
      optional on the command line. Any other parameter is a word of the command
      line ("" if it is missing). Returns the result, or None in a process of several that has nothing to say.
    flags: the program's own flags, defined with `flag_values=flags` so that two programs may use the same name.
    one_arena: of `keep_freed_memory`; a program that decodes is faster with several.
  """
  sys.exit(_run(main, absl_flags.FlagValues() if flags is None else flags, one_arena))


def _run(main: Callable[..., dict | None], flags: absl_flags.FlagValues, one_arena: bool) -> int:
  parameters = inspect.signature(main).parameters
  # Until a program says what else is to be done, as training does with `Preemption`.
  signal.signal(signal.SIGTERM, _preempted)
  try:
    command_line.define(flags, set(parameters))
    if any(arg in ("--help", "-help", "-h", "--helpfull", "--helpshort") for arg in sys.argv[1:]):
      doc = (sys.modules[main.__module__].__doc__ or "").strip()
      print(f"{doc}\n{flags.get_help(include_special_flags=False)}")
      return 0
    words = [name for name in parameters if name not in ("config", "workdir")]
    required = {name for name, p in parameters.items() if p.default is p.empty and name not in words}
    arguments = command_line.parse(sys.argv, flags, required, words)
    absl_flags.FLAGS.mark_as_parsed()  # libraries look up flags of their own there
    prepare(one_arena)
    result = main(**arguments)
    if result is not None:
      print(json.dumps(_plain(result)), flush=True)
    return 0
  except (UserError, KeyboardInterrupt) as error:
    return explain(error)


def _preempted(*_) -> None:
  print("SIGTERM: stopped before its end", file=sys.stderr, flush=True)
  raise SystemExit(PREEMPTED)


def explain(error: BaseException) -> int:
  """Says on stderr what ended the program, and returns its exit code: a line, or the traceback of a bug."""
  if isinstance(error, UserError):
    print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
    return error.exit_code
  if isinstance(error, KeyboardInterrupt):
    print("error: interrupted", file=sys.stderr)
    return 130
  traceback.print_exception(error)
  return 1


def prepare(one_arena: bool = True) -> None:
  """Sets up a process that is to compute: logs, jax's environment, memory. Comes before jax is imported."""
  _quiet_logs()
  _set_environment()
  keep_freed_memory(one_arena)


def seeds(texts: list[str]) -> list[int]:
  """Returns the numbers of a `--seeds` flag; anything else is the user's mistake."""
  for text in texts:
    if not text.isdecimal():
      raise UserError(f"--seeds={text}: wanted a number, or several: 0,1,2")
  return [int(text) for text in texts]


def cache_dir() -> Path:
  """Returns the folder for what can be made again, such as compiled programs: $MOE_LAB_CACHE or ~/.cache/moe_lab."""
  return Path(os.environ.get("MOE_LAB_CACHE") or "~/.cache/moe_lab").expanduser()


def _set_environment() -> None:
  """Tells jax to keep compiled programs. jax reads its environment when it is imported, so this comes first."""
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "jax"))
  # The default of one second would leave out most of what a small model on CPU compiles.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def keep_freed_memory(one_arena: bool = True) -> None:
  """Tells glibc to keep what is freed; nothing happens on another C library.

  XLA on CPU takes a step's buffers anew at every step. By default glibc gives
  blocks of that size back to the system, which clears each page again when it
  is next touched: in a virtual machine about a seventh of a small model's step.
  With several arenas a training step still clears pages (a tenth slower);
  decoding takes few blocks and small ones, and threads that share an arena wait
  for each other (a fifth slower).
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    if one_arena:
      mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def _quiet_logs() -> None:
  """Sends logs to stderr: ours from INFO, the libraries' from WARNING."""
  logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
  absl_logging.set_verbosity(absl_logging.WARNING)
  for name in ("moe_lab", "experiments", "__main__"):
    logging.getLogger(name).setLevel(logging.INFO)


def _plain(value: object) -> object:
  """Returns `value` as JSON has it; a number that is not finite, which JSON has not, is null."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return str(value) if isinstance(value, Path) else value
