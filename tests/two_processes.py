"""Two processes of four CPU devices each, which meet over gloo, as two hosts would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": "4",
  "PYTHONPATH": str(ROOT),
}


def free_port() -> int:
  """Returns a port of this machine that nobody listens at."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(*command: str, folder: Path = ROOT, second: str = "", **environment: str) -> list[subprocess.Popen]:
  """Starts a Python command twice, as process 0 and process 1; `second` is an argument that only the latter gets."""
  where = (f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2")
  own = (("--process_id=0",), ("--process_id=1", *filter(None, [second])))
  return [
    subprocess.Popen(
      [sys.executable, *command, *where, *own[index]],
      cwd=folder,
      env=ENVIRONMENT | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]


def ends(processes: list[subprocess.Popen], timeout: float = 900) -> list[tuple[int, str, str]]:
  """Returns (exit code, stdout, stderr) of each, all at an end; kills what has not ended in time."""
  try:
    said = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


_JOINED = """
import sys
from absl import flags
from moe_lab.config import hosts as host_flags
own = flags.FlagValues()
host_flags.define(own)
own(sys.argv)
from moe_lab.io.hosts import joined
with joined(host_flags.given(own)):
"""


def run(checks: str) -> None:
  """Runs a script on both; each ends by printing "all equal"."""
  body = "".join(f"  {line}\n" for line in checks.splitlines())
  for code, stdout, stderr in ends(start("-c", _JOINED + body)):
    assert code == 0 and stdout.strip().endswith("all equal"), stderr[-4000:]
