"""The program that serves: what its flags refuse, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from experiments import serve
from moe_lab.errors import UserError
from tests.experiments.test_programs import ROOT, SMALL, program

FAST = pytest.importorskip("fastapi")


def flags(*arguments):
  for name in serve.FLAGS:
    serve.FLAGS[name].unparse()
  serve.FLAGS(["serve", *arguments])


def test_only_this_machine_is_served_without_a_key(monkeypatch):
  monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
  flags()
  assert serve._address(serve._key())[2]
  flags("--host=0.0.0.0")
  with pytest.raises(UserError, match="--host=0.0.0.0: wanted a key for other machines' clients .*or --without_key"):
    serve._address(serve._key())
  assert not serve._address("a-key")[2]
  flags("--host=0.0.0.0", "--without_key")
  assert not serve._address(None)[2]
  flags("--host=no.such.name.invalid")
  with pytest.raises(UserError, match="--host=no.such.name.invalid: wanted a name or an address"):
    serve._address(None)


def test_the_key_comes_from_a_file_or_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv(serve.KEY_VARIABLE, "of-environment")
  flags()
  assert serve._key() == "of-environment"
  (tmp_path / "key").write_text("of-file\n")
  flags(f"--api_key_file={tmp_path}/key")
  assert serve._key() == "of-file"
  for bad in ("", "two words", "schlüssel"):
    (tmp_path / "key").write_text(bad)
    with pytest.raises(UserError, match="wanted a key of printable ASCII characters") as raised:
      serve._key()
    assert not bad or bad not in str(raised.value)
  flags(f"--api_key_file={tmp_path}/none")
  with pytest.raises(UserError, match="wanted a file with a key"):
    serve._key()


def test_a_port_that_another_holds_is_told_first():
  with socket.create_server(("127.0.0.1", 0)) as other:
    flags(f"--port={other.getsockname()[1]}")
    family, address, _ = serve._address(None)
    with pytest.raises(UserError, match=f"--port={other.getsockname()[1]}: cannot listen at 127.0.0.1"):
      serve._listener(family, address)


@pytest.mark.slow
def test_the_program_from_start_to_end(tmp_path):
  openai = pytest.importorskip("openai")
  (tmp_path / "text").mkdir()
  for index in range(40):
    lines = [f"def function_{index}_{line}(x):\n  return x + {index * line}\n" for line in range(30)]
    (tmp_path / "text" / f"{index}.py").write_text("\n".join(lines))
  trained = program(tmp_path, "train", *SMALL, "--config.data.sources=text:text", "--workdir=run")
  assert trained.returncode == 0, trained.stderr
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", serve.KEY_VARIABLE: "the-key"}
  arguments = ["--workdir=run", "--port=0", "--slots=4", "--context=64"]
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.serve", *arguments],
    cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    line = next(line for line in process.stderr if line.startswith("run at http://127.0.0.1:"))
    url = line.split()[2].rstrip(",")
    assert "with a key" in line
    with openai.OpenAI(base_url=f"{url}/v1", api_key="the-key") as client:
      reply = client.completions.create(model="run", prompt="def f", max_tokens=8, temperature=0)
      generated = program(tmp_path, "generate", "--workdir=run", "--prompt=def f", "--max_tokens=8", "--temperature=0")
      assert reply.choices[0].text == json.loads(generated.stdout.splitlines()[-1])["text"]
      stream = client.completions.create(model="run", prompt="x", max_tokens=60, stream=True)
      next(stream)
      process.send_signal(signal.SIGTERM)
      assert list(stream)[-1].choices[0].finish_reason
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  result = json.loads(out.splitlines()[-1])
  assert process.returncode == 0 and result["requests"] == {"200": 2} and result["unfinished"] == 0, err
  assert "def f" not in err
