"""Runs Python that nobody has read, behind three walls; without bubblewrap it runs nothing.

  namespaces   `bwrap` gives the program a file system of its own: this interpreter, its library and the system's shared
               libraries, all read-only. No home, no /etc, /proc, /sys or /dev, no environment, no network, no other
               process in sight, user 65534 without capabilities, and `no_new_privs`. It dies with the process that
               started it. Nothing can be written: a /tmp of limited size would hold any number of empty files, and
               those took 400 MB of the kernel's memory in three seconds (a `tmpfs` of 16 MB, Linux 6.18).
  system calls a filter ([seccomp.py](seccomp.py)) has no fork and no socket: a program is one process.
  limits       address space, CPU time, open files, no core file; a wall clock outside, which kills the namespace; and a
               cap on the output that is kept.

So a sandbox takes at most `MEMORY` bytes and one processor for `timeout` seconds. The walls are the kernel's: a flaw in
what is left of its system calls is a way out. Run by root, the program's user is root's own number outside, without any
capability; run by anybody else, theirs.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_lab.errors import UserError
from moe_lab.evaluate import seccomp

MEMORY = 512 * 2**20  # bytes of address space
OUTPUT = 64 * 2**10  # bytes that are kept
OPEN_FILES = 64
TIMEOUT = 10.0  # seconds, the start of the interpreter included

_PYTHON = "/python"  # where the interpreter is inside
_STARTED = b"started"

# The first words inside. Standard error is bwrap's and ours up to the mark, and the program's from there on.
_LAUNCHER = f"""
import os, resource, sys
for name, most in LIMITS:
  resource.setrlimit(getattr(resource, name), (most, most))
source = open(0, "rb").read()
os.write(2, {_STARTED!r})
os.dup2(1, 2)
exec(compile(source, "program", "exec"), {{"__name__": "__main__"}})
"""


class NoSandbox(UserError):
  """There is no sandbox on this machine, and so nothing runs."""


class Ended(NamedTuple):
  """How a program ended.

  Attributes:
    how: "exit", "signal", "time-out", or "output" (it wrote more than is kept, and was killed).
    code: its exit status, or the signal's number; None if it was killed from outside.
    output: what it wrote on both standard streams, up to the cap.
    seconds: wall clock.
  """

  how: str
  code: int | None
  output: str
  seconds: float


def run(source: str, *, timeout: float = TIMEOUT) -> Ended:
  """Runs a program to its end, or to its limits.

  Raises:
    NoSandbox: bubblewrap is missing or cannot work here.
  """
  check()
  return _run(source, timeout)


class Running:
  """A program that was started.

  Attributes:
    process: bwrap, whose end is the program's.
  """

  def __init__(self, process: subprocess.Popen, inside: int | None):
    self.process = process
    self._inside = inside  # the program's own process, by its number outside

  def read(self, deadline: float) -> tuple[bytes, str | None]:
    """Reads what a program with stdout=PIPE writes, until it closes its output.

    Args:
      deadline: by time.monotonic().

    Returns:
      The first OUTPUT bytes, and why reading ended early: "time-out", "output" or None.
    """
    kept, source = b"", self.process.stdout
    with selectors.DefaultSelector() as selector:
      selector.register(source, selectors.EVENT_READ)
      while selector.select(max(deadline - time.monotonic(), 0)):
        data = os.read(source.fileno(), OUTPUT + 1 - len(kept))
        if not data:
          return kept, None
        kept += data
        if len(kept) > OUTPUT:
          return kept[:OUTPUT], "output"
    return kept, "time-out"

  def wait(self, deadline: float) -> tuple[str, int | None]:
    """Returns how the program ended and its code, as in `Ended`; kills it at the deadline.

    Raises:
      NoSandbox: the sandbox itself failed.
    """
    try:
      status = self.process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
      self.kill()
      return "time-out", None
    said = self.process.stderr.read()
    if not said.startswith(_STARTED):
      raise NoSandbox(f"sandbox: bwrap does not work on this machine: {_last_line(said)}")
    # As a shell says it. A program may lie about its signal: it harms its own record alone.
    return ("exit", status) if status <= 128 else ("signal", status - 128)

  def kill(self) -> None:
    """Ends the program; when this returns nothing is left of it."""
    # The program is the first process of its namespace, so that the namespace goes with it; bwrap, its parent, reaps
    # it and ends. Were bwrap killed first, that would be left to the init of a container, and not all of those reap.
    if self.process.poll() is None and self._inside:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._inside, signal.SIGKILL)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self.process.wait(5)
    self.process.kill()
    self.process.wait()


@contextlib.contextmanager
def start(
  source: str, *, timeout: float, pass_fds: Sequence[int] = (), stdout: int = subprocess.DEVNULL
) -> Iterator[Running]:
  """Starts a program, and kills it at the end of the context. Call `check` before.

  The thread that starts it has to outlive it: by Linux's rules the program dies with that thread.

  Args:
    timeout: seconds of CPU time; the wall clock is the caller's.
    pass_fds: open files that it gets, under the same numbers.
    stdout: of both its standard streams: a file descriptor, or subprocess's PIPE or DEVNULL.
  """
  filter_fd, source_fd = _sealed("filter", seccomp.program()), _sealed("program", source.encode())
  info_read, info_write = os.pipe()
  try:
    process = subprocess.Popen(
      _command(filter_fd, info_write, timeout),
      stdin=source_fd, stdout=stdout, stderr=subprocess.PIPE, pass_fds=(filter_fd, info_write, *pass_fds), env={},
    )  # fmt: skip
  finally:
    for fd in (filter_fd, source_fd, info_write):
      os.close(fd)
  running = Running(process, None)
  with process, open(info_read) as info:
    try:
      inside = re.search(r'"child-pid": (\d+)', info.read())
      running = Running(process, int(inside[1]) if inside else None)
      yield running
    finally:
      running.kill()


@functools.cache
def check() -> None:
  """Proves once that the sandbox holds: a program inside tries what it must not be able to do.

  Raises:
    NoSandbox: says what to install, or what did not hold.
  """
  if sys.platform != "linux" or not seccomp.knows():
    raise NoSandbox("sandbox: wanted Linux on x86_64 or aarch64; generated code is not run without one")
  if shutil.which("bwrap") is None:
    raise NoSandbox(
      "sandbox: wanted `bwrap` to run generated code in (apt-get install bubblewrap); it is not run without one"
    )
  with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
    canary = Path(folder, "canary")
    canary.write_text("outside")
    outside = f"CANARY, PORT = {str(canary)!r}, {server.getsockname()[1]}\n"
    result = _run(outside + _PROBE, TIMEOUT)
    intact = os.listdir(folder) == ["canary"] and canary.read_text() == "outside"
  lines = result.output.splitlines()
  if result.how != "exit" or not lines or not lines[-1].startswith("["):
    raise NoSandbox(f"sandbox: its self-test ended by {result.how} {result.code}: {_last_line(result.output.encode())}")
  broken = json.loads(lines[-1]) + ([] if intact else ["writing outside"])
  if broken:
    raise NoSandbox(f"sandbox: it does not hold on this machine ({', '.join(broken)} worked); nothing is run in it")


_PROBE = """
import json, os, socket
def open_to_write(path):
  os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
def memory():
  for _ in range(1024):
    os.getpid(), kept.append(bytearray(2**22))
attempts = {
  "reading outside": lambda: open(CANARY).read(),
  "writing outside": lambda: open_to_write(CANARY),
  "writing to the root": lambda: open_to_write("/new"),
  "writing to /tmp": lambda: open_to_write("/tmp/new"),
  "writing to the library": lambda: open_to_write(os.path.join(os.path.dirname(os.__file__), "new.py")),
  "a listing of /proc": lambda: os.listdir("/proc"),
  "a socket": lambda: socket.socket(),
  "the network": lambda: socket.create_connection(("127.0.0.1", PORT), 1),
  "a second process": lambda: os.fork() or os._exit(0),
  "becoming root": lambda: os.setuid(0),
  "endless memory": memory,
}
worked, kept = [], []
for name, attempt in attempts.items():
  try:
    attempt()
  except (OSError, MemoryError):
    kept.clear()
  else:
    worked.append(name)
if os.getuid() != 65534:
  worked.append("another user")
if set(os.environ) - {"LD_LIBRARY_PATH", "PYTHONHASHSEED", "PWD", "LC_CTYPE"}:
  worked.append("reading the environment")
print(json.dumps(worked))
"""


def _run(source: str, timeout: float) -> Ended:
  begin = time.monotonic()
  with start(source, timeout=timeout, stdout=subprocess.PIPE) as running:
    output, early = running.read(begin + timeout)
    how, code = (early, None) if early else running.wait(begin + timeout)
  return Ended(how, code, output.decode(errors="replace"), time.monotonic() - begin)


def _sealed(name: str, data: bytes) -> int:
  """Returns a file in memory that nobody can change any more, open at its beginning."""
  fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
  with open(fd, "wb", closefd=False) as file:
    file.write(data)
  os.lseek(fd, 0, os.SEEK_SET)
  fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
  return fd


def _command(filter_fd: int, info_fd: int, timeout: float) -> list[str]:
  """Returns the line that runs the launcher in a sandbox of its own."""
  seconds = int(timeout) + 1
  limits = [
    ("RLIMIT_AS", MEMORY), ("RLIMIT_CPU", seconds), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", OPEN_FILES),
    ("RLIMIT_NPROC", 1), ("RLIMIT_CORE", 0), ("RLIMIT_MEMLOCK", 0),
  ]  # fmt: skip
  return [
    shutil.which("bwrap"),
    "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
    "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL",
    "--die-with-parent", "--new-session", "--as-pid-1", "--seccomp", str(filter_fd), "--info-fd", str(info_fd),
    *_root(),
    "--remount-ro", "/", "--chdir", "/",
    "--setenv", "LD_LIBRARY_PATH", f"{_PYTHON}/lib",
    "--setenv", "PYTHONHASHSEED", "0",  # the order of a set is the same whenever a program is judged
    "--", f"{_PYTHON}/bin/python", "-s", "-S", "-P", "-B", "-X", "utf8", "-c", f"LIMITS = {limits}\n{_LAUNCHER}",
  ]  # fmt: skip


@functools.cache
def _root() -> list[str]:
  """Returns bwrap's arguments for what is there: shared libraries, and the interpreter without installed packages."""
  arguments = []
  for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
    if os.path.islink(folder):
      arguments += ["--symlink", os.readlink(folder), folder]
    elif os.path.isdir(folder):
      arguments += ["--ro-bind", folder, folder]
  stdlib = Path(sysconfig.get_path("stdlib"))
  place = Path(_PYTHON, stdlib.relative_to(sys.base_prefix))
  # An interpreter of its own folder brings libraries beside the standard one; the system's are there already.
  bound, where = (stdlib, place) if sys.base_prefix == "/usr" else (stdlib.parent, place.parent)
  arguments += ["--ro-bind", str(bound), str(where)]
  if (stdlib / "site-packages").is_dir():
    hidden = str(place / "site-packages")
    arguments += ["--tmpfs", hidden, "--remount-ro", hidden]
  return [*arguments, "--ro-bind", os.path.realpath(sys.executable), f"{_PYTHON}/bin/python"]


def _last_line(said: bytes) -> str:
  lines = said.decode(errors="replace").split("\n")
  return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it says nothing")
