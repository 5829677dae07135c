"""What a program answers on its command line, from a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

_PROGRAM = '''"""Does nothing, thoroughly."""
import os
import sys
from absl import flags
from moe_lab.config import program
from moe_lab.errors import RunError

FLAGS = flags.FlagValues()
MOOD = flags.DEFINE_enum("mood", "ok", ["ok", "user", "run", "bug", "interrupt", "preempted"], "How to end.",
                         flag_values=FLAGS)

def main(config, workdir):
  if MOOD.value == "run":
    raise RunError("the disk\\nis full")
  if MOOD.value == "bug":
    raise ValueError("a bug")
  if MOOD.value == "interrupt":
    raise KeyboardInterrupt
  if MOOD.value == "preempted":
    raise SystemExit(75)
  print("progress")
  return {"steps": config.train.steps, "sources": config.data.sources, "qk_norm": config.model.qk_norm,
          "workdir": workdir, "loss": float("nan"), "nested": [float("inf"), 1.5],
          "jax": "jax" in sys.modules, "cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}

if __name__ == "__main__":
  program.run(main, FLAGS)
'''

_CONFIG = """from moe_lab.config import base_config

def get_config(arg=None):
  config = base_config()
  config.train.steps = int(arg or 5)
  return config
"""


@pytest.fixture
def run(tmp_path):
  """Returns a function that runs the program in a folder of its own, where `a.py` is a config file."""
  (tmp_path / "prog.py").write_text(_PROGRAM)
  (tmp_path / "a.py").write_text(_CONFIG)

  def run(*args, program="prog.py"):
    env = {**os.environ, "PYTHONPATH": str(_ROOT), "MOE_LAB_CACHE": str(tmp_path / "cache")}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.run([sys.executable, program, *args], cwd=tmp_path, env=env, capture_output=True, text=True)

  return run


def _one_line(done, *parts, code=2):
  assert done.returncode == code, done.stderr
  assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
  for part in parts:
    assert part in done.stderr
  assert done.stdout == ""


def test_the_result_is_the_last_line_and_finite(run, tmp_path):
  done = run("--config=a.py:7", "--workdir=w")
  assert done.returncode == 0 and done.stderr == ""
  assert done.stdout.splitlines()[0] == "progress"
  assert json.loads(done.stdout.splitlines()[-1]) == {
    "steps": 7,
    "sources": ["stdlib"],
    "qk_norm": True,
    "workdir": "w",
    "loss": None,
    "nested": [None, 1.5],
    "jax": False,
    "cache": str(tmp_path / "cache" / "jax"),
  }


@pytest.mark.parametrize(
  "override, field, value",
  [
    (["--config.train.steps=3"], "steps", 3),
    (["--config.train.steps", "3"], "steps", 3),
    (["--config.train.steps=3", "--config.train.steps=4"], "steps", 4),
    (["--noconfig.model.qk_norm"], "qk_norm", False),
    (["--config.model.qk_norm=false"], "qk_norm", False),
    (["--config.data.sources=('text:/x',)"], "sources", ["text:/x"]),
    (["--config.data.sources=text:/x"], "sources", ["text:/x"]),
    (["--config.data.sources=text:/x y/*.txt,stdlib"], "sources", ["text:/x y/*.txt", "stdlib"]),
    (["--config.data.sources=text:/x", "--config.data.sources=text:/y"], "sources", ["text:/x", "text:/y"]),
  ],
)
def test_overrides(run, override, field, value):
  # Overrides may come before the file that they override.
  done = run(*override, "--config", "a.py", "--workdir=w")
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])[field] == value


@pytest.mark.parametrize(
  "args, parts",
  [
    (["--config=a.py", "--wokdir=w"], ["--wokdir=w", "'--workdir'"]),
    (["--config=a.py", "--workdir=w", "--mod=ok"], ["--mod=ok", "'--mood'"]),
    (["--config=a.py", "--workdir=w", "--mood=usre"], ["--mood=usre", "'user'"]),
    (["--config=a.py", "--workdir=w", "--confg.train.steps=3"], ["--confg.train.steps=3", "'--config.train.steps'"]),
    (["--config=a.py", "--workdir=w", "--config.train.stepz=3"], ["config.train.stepz = '3'", "'train.steps'"]),
    (["--config=a.py", "--workdir=w", "--config.trian.steps=3"], ["config.trian.steps = '3'", "'train.steps'"]),
    (["--config=a.py", "--workdir=w", "--config.stepz=3"], ["config.stepz = '3'", "'train.steps'"]),
    (["--config=a.py", "--workdir=w", "--config.train=3"], ["config.train = '3'", "steps"]),
    (["--config=a.py", "--workdir=w", "--config.train.steps=abc"], ["config.train.steps = 'abc'", "an integer"]),
    (["--config=a.py", "--workdir=w", "--config.train.steps"], ["config.train.steps"]),
    (["--config=a.py", "--workdir=w", "--noconfig.train.steps"], ["noconfig.train.steps", "'--config.train.steps'"]),
    (["--config=a.py", "--workdir=w", "--config.model.qk_norm=maybe"], ["model.qk_norm = 'maybe'", "true or false"]),
    (["--config=a.py", "--workdir=w", "--config.model.position=albi"], ["model.position = 'albi'", "'alibi'"]),
    (["--config=a.py", "--workdir=w", "--config.routing.k_max=99"], ["routing.k_max = 99", "model.num_experts = 16"]),
    (["--config=a.py", "--workdir=w", "train"], ["'train'", "flags only"]),
    (["--config=a.py"], ["--workdir"]),
    (["--workdir=w"], ["--config", "configs/quickstart.py"]),
    (["--config=aa.py", "--workdir=w"], ["--config=aa.py", "'a.py'"]),
    (["--config=prog.py", "--workdir=w"], ["--config=prog.py", "get_config"]),
    (["--config=.", "--workdir=w"], ["--config=.", "FILE.py"]),
    (["--config=a.py:x", "--workdir=w"], ["a.py:5", "int(arg or 5)", "'x'"]),
  ],
)
def test_a_mistake_on_the_command_line_is_one_line(run, args, parts):
  _one_line(run(*args), *parts)


@pytest.mark.parametrize(
  "line, parts",
  [
    ("config.train.stepz = 3", ["bad.py:4", "'train.stepz'", "'train.steps'"]),
    ("config.train['stepz'] = 3", ["bad.py:4", "'train.steps'"]),
    ("config.train.update(warmup_stepz=config.train.steps)", ["bad.py:4", "'warmup_stepz'", ".warmup_steps'"]),
    ("print(config.routing.buget)", ["bad.py:4", "'routing.budget'"]),
    ("config.train.steps = 'abc'", ["bad.py:4", "abc", "int"]),
    ("config.train.steps = True", ["config.train.steps = True", "an integer"]),
    ("config.train.steps = 0", ["config.train.steps = 0", "at least 1"]),
    ("{}['absent']", ["bad.py:4", "KeyError: absent"]),
    ("raise RuntimeError('two\\nlines')", ["bad.py:4", "RuntimeError: two"]),
    ("import nothing_of_this_name", ["bad.py:4", "nothing_of_this_name"]),
    ("if config", ["bad.py:4", "SyntaxError"]),
    ("return None", ["bad.py", "NoneType", "base_config()"]),
  ],
)
def test_a_mistake_in_the_config_file_is_one_line(run, tmp_path, line, parts):
  head = "from moe_lab.config import base_config\ndef get_config():\n  config = base_config()\n"
  (tmp_path / "bad.py").write_text(f"{head}  {line}\n  return config\n")
  _one_line(run("--config=bad.py", "--workdir=w"), *parts)


def test_how_main_ends(run):
  end = ["--config=a.py", "--workdir=w"]
  _one_line(run(*end, "--mood=run"), "the disk is full", code=1)
  _one_line(run(*end, "--mood=interrupt"), "interrupted", code=130)
  assert run(*end, "--mood=preempted").returncode == 75
  bug = run(*end, "--mood=bug")
  assert bug.returncode == 1 and "Traceback" in bug.stderr and "ValueError: a bug" in bug.stderr


def test_help_explains_every_flag(run):
  done = run("--help")
  assert done.returncode == 0 and done.stderr == ""
  assert "Does nothing, thoroughly." in done.stdout
  for part in ("--config:", "--workdir:", "--mood:", "How to end.", "schema.py"):
    assert part in done.stdout


def test_a_program_has_only_the_flags_that_its_main_takes(run, tmp_path):
  (tmp_path / "small.py").write_text(
    "from moe_lab.config import program\ndef main(workdir=None):\n  return {'workdir': workdir}\nprogram.run(main)\n"
  )
  assert run(program="small.py").stdout == '{"workdir": null}\n'
  assert run("--workdir=w", program="small.py").stdout == '{"workdir": "w"}\n'
  _one_line(run("--config=a.py", program="small.py"), "--config=a.py: wanted one of --workdir")
  _one_line(run("--config.train.steps=3", program="small.py"), "wanted one of --workdir")
