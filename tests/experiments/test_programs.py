"""The programs as a user runs them: train, continue, evaluate, generate, report; and every mistake in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
  "--config=configs/quickstart.py",
  "--config.model.dim=16",
  "--config.model.num_layers=2",
  "--config.model.num_experts=4",
  "--config.model.expert_dim=8",
  "--config.model.head_dim=8",
  "--config.routing.k_max=4",
  "--config.routing.warmup_steps=2",
  "--config.data.vocab_size=300",
  "--config.data.seq_len=32",
  "--config.train.steps=6",
  "--config.train.batch_size=8",
  "--config.train.log_every=2",
  "--config.train.eval_every=4",
  "--config.train.eval_batches=1",
  "--config.train.checkpoint_every=4",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a corpus, `text`, and a trained run, `run`."""
  folder = tmp_path_factory.mktemp("programs")
  (folder / "text").mkdir()
  for index in range(40):
    lines = [f"def function_{index}_{line}(x):\n  return x + {index * line}\n" for line in range(30)]
    (folder / "text" / f"{index}.py").write_text("\n".join(lines))
  result = program(folder, "train", *SMALL, "--config.data.sources=text:text", "--workdir=run")
  assert result.returncode == 0, result.stderr
  return folder


def program(folder: Path, name: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
  """Runs experiments.NAME in `folder` with `text` typed in; configs are given relative to the repository."""
  arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{name}", *arguments],
    cwd=folder,
    env={
      "PATH": "/usr/bin:/bin",
      "HOME": str(folder),
      "PYTHONPATH": str(ROOT),
      "MOE_LAB_CACHE": str(folder / "cache"),
      "JAX_PLATFORMS": "cpu",  # libtpu, installed for `tpu_compile`, looks for a TPU and complains on stderr
    },
    capture_output=True,
    input=text,
    text=True,
    timeout=300,
  )


def result_of(process: subprocess.CompletedProcess) -> dict:
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout.splitlines()[-1])


def files(folder: Path) -> dict[Path, bytes]:
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_run_directory_is_complete(place):
  for name in ("config.json", "run.json", "metrics.jsonl", "evaluation.json", "report.html", "tokenizer.model"):
    assert (place / "run" / name).stat().st_size > 0, name
  run = json.loads((place / "run" / "run.json").read_text())
  (source,) = run["data"]
  assert len(source["files"]) == 40 and {"file", "sha256", "bytes", "license"} <= source["files"][0].keys()


def test_evaluate(place):
  keys = {"val_loss", "mean_experts", "flops_per_token", "by_class"}
  validation = result_of(program(place, "evaluate", "--workdir=run", "--split=validation"))
  assert keys <= validation.keys()
  trained = json.loads((place / "run" / "evaluation.json").read_text())
  assert validation["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-6)
  test = result_of(program(place, "evaluate", "--workdir=run", "--split=test"))
  assert test["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-6) and "val_loss" not in test
  refused = program(place, "evaluate", "--workdir=run", "--budget=3")
  assert refused.returncode == 2 and "--budget=3: wanted 2, what the run was trained for" in refused.stderr


def test_generate_and_report(place):
  arguments = ("--workdir=run", "--prompt=def ", "--max_tokens=12", "--seed=3")
  first, second = (result_of(program(place, "generate", *arguments)) for _ in range(2))
  assert first["text"] == second["text"] and first["tokens"] <= 12 and 1 <= first["mean_experts"] <= 4
  assert len(first["experts"]) == len(first["log_probs"]) == first["tokens"]
  assert first["cache_bytes"] <= first["full_cache_bytes"]
  assert first["stopped"] or first["tokens"] == 12
  before = (place / "run" / "report.html").read_text()
  assert result_of(program(place, "report", "--workdir=run"))["report"].endswith("report.html")
  assert (place / "run" / "report.html").read_text() == before


@pytest.mark.slow
def test_generate_answers_a_file_and_a_talk(place):
  lines = [{"prompt": "def ", "max_tokens": 3}, {"prompt": "return", "temperature": 0, "stop": "(", "max_experts": 1}]
  (place / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
  arguments = ("--workdir=run", "--prompts=some.jsonl", "--max_tokens=9", "--steady")
  result = result_of(program(place, "generate", *arguments))
  answers = [json.loads(line) for line in (place / result["file"]).read_text().splitlines()]
  answers.sort(key=lambda answer: answer["index"])
  assert [answer["prompt"] for answer in answers] == ["def ", "return"] and result["prompts"] == 2
  assert len(answers[0]["tokens"]) <= 3 and set(answers[1]["experts"]) == {1.0} and "(" not in answers[1]["text"]
  refused = program(place, "generate", *arguments)
  assert refused.returncode == 2 and "is there already" in refused.stderr
  talk = result_of(program(place, "generate", "--workdir=run", "--chat", "--max_tokens=4", text="x = 1\ny = 2\n"))
  assert talk["turns"] == 2 and len(talk["text"]) == 2 and talk["tokens"] <= 8


@pytest.mark.slow
def test_what_responses_of_a_run_cost(place):
  asked = ("--workdir=run", "--concurrency=2", "--responses=4", "--rounds=2", "--price_per_hour=2", "--out=costs")
  process = program(place, "benchmark", "cost", *asked)
  result = result_of(process)
  assert [(cell["who"], cell["clients"], cell["responses"]) for cell in result["cells"]] == [
    (who, clients, 4) for clients in (1, 2) for who in ("dynamic", "dynamic, steady", "fixed")
  ]
  assert result["model"] == "the model of run, step 6" and "a p99 wants 100 and more" in process.stderr
  assert {path.suffix for path in (place / "costs").iterdir()} == {".md", ".json", ".html"}
  assert result["file"].endswith(".md") and result["cells"][0]["price_per_million_tokens"] > 0


PRESET = ("--config=configs/medium_50b.py:8k",)
TEXT = ("--config.data.sources=text:text", "--workdir=new")


@pytest.mark.parametrize(
  ("name", "arguments", "words"),
  [
    ("train", ("--config.data.sources=text:nothing", "--workdir=new"), ("config.data.sources", "nothing")),
    ("train", ("--config.data.sources=text:empty", "--workdir=new"), ("config.data.sources", "empty")),
    ("train", ("--config.data.sources=text:latin1", "--workdir=new"), ("UTF-8", "bad.txt")),
    ("train", (*TEXT, "--config.data.vocab_size=50000"), ("config.data.vocab_size", "50000")),
    ("train", (*TEXT, "--config.routing.budget=9"), ("config.routing.budget", "9", "4")),
    ("train", (*TEXT, "--config.routing.k_max=5"), ("config.routing.k_max", "num_experts = 4")),
    ("train", (*TEXT, "--config.routing.budgt=3"), ("budgt", "budget")),
    ("train", (*TEXT[:1], "--config.train.steps=7", "--workdir=run"), ("config.train.steps", "7", "6")),
    ("train", (*TEXT[:1], "--workdir=text"), ("--workdir", "text")),
    ("train", ("--config.data.sources=text:more", "--workdir=run"), ("config.data.sources", "run")),
    ("evaluate", ("--workdir=runn",), ("runn", "run")),
    ("evaluate", ("--workdir=run", "--step=5"), ("step 5", "6")),
    ("evaluate", ("--workdir=run", "--split=tset"), ("tset", "test")),
    ("evaluate", ("--workdir=run", "--budget=17"), ("--budget=17", "wanted 2")),
    ("generate", ("--workdir=run", "--bugdet=2"), ("bugdet", "budget")),
    ("generate", ("--workdir=run", "--chat", "--prompts=x"), ("--prompts", "--chat")),
    ("generate", ("--workdir=run", "--prompts=nowhere.txt"), ("nowhere.txt",)),
    ("generate", ("--workdir=run", "--budget=3"), ("--budget=3", "wanted 2")),
    ("generate", ("--workdir=run", "--seed=-1", "--prompt=def "), ("error: seed=-1", "from 0")),
    ("generate", ("--workdir=run", "--prompt=caf\udce9"), ("prompt", "UTF-8", "character 4")),
    ("generate", ("--workdir=run", "--slots=2"), ("--slots=2", "--prompts only")),
    ("serve", ("--workdir=run", "--slot=2"), ("slot", "slots")),
    ("serve", ("--workdir=run", "--port=0", "--budget=3"), ("--budget=3", "wanted 2")),
    ("serve", ("--workdir=run", "--host=0.0.0.0"), ("--host=0.0.0.0", "MOE_LAB_API_KEY", "--without_key")),
    ("generate", ("--workdir=run", "--resident_experts=5"), ("resident_experts=5", "from 0 to 4")),
    ("generate", ("--workdir=run", "--resident_experts=-1"), ("--resident_experts=-1",)),
    ("report", ("--workdir=nowhere",), ("nowhere",)),
    ("benchmark", (), ("benchmark", "train_step", "decode")),
    ("benchmark", ("train_stp",), ("train_stp", "did you mean 'train_step'")),
    ("benchmark", ("moe_layer", "decode"), ("decode", "flags only")),
    ("benchmark", ("moe_layer", "--method=dynamc"), ("--method=dynamc", "dynamic")),
    ("benchmark", ("moe_layer", "--k=2.5"), ("--k=2.5", "whole number")),
    ("benchmark", ("moe_layer", "--k=17"), ("routing.k", "17", "16")),
    ("benchmark", ("moe_layer", "--experts=64"), ("--experts=64", "64x128")),
    ("benchmark", ("decode", "--k=2", "--experts=4x8"), ("routing.k_max", "8", "4")),
    ("benchmark", ("decode", "--method=overflow"), ("overflow", "moe_layer")),
    ("benchmark", ("attention", "--peers=eager"), ("--peers=eager", "all or none")),
    ("benchmark", ("long_attention", "--k=2"), ("--k", "long_attention")),
    ("benchmark", ("decode", "--responses=5"), ("--responses", "cost only")),
    ("benchmark", ("decode", "--workdir=run"), ("--workdir", "cost only")),
    ("benchmark", ("cost", "--k=9"), ("--k=9", "from 1 to 8")),
    ("benchmark", ("cost", "--workdir=run", "--k=3"), ("--k=3", "wanted 2")),
    ("benchmark", ("cost", "--workdir=runn"), ("runn", "run")),
    ("benchmark", ("cost", "--workdir=run", "--experts=8x8"), ("--experts", "--workdir")),
    ("benchmark", ("cost", "--method=topk"), ("--method", "fixed")),
    ("benchmark", ("cost", "--concurrency=0"), ("--concurrency=0", "positive")),
    ("benchmark", ("cost", "--responses=many"), ("--responses", "many")),
    ("benchmark", ("cost", "--price_per_hour=nan"), ("--price_per_hour=nan", "finite")),
    ("benchmark", ("cost", "--grid_g_per_kwh=-1"), ("--grid_g_per_kwh", "-1")),
    ("train", (*TEXT, "--config.mesh.fsdp=3"), ("config.mesh.fsdp = 3", "model.dim = 16")),
    ("train", (*TEXT, "--config.mesh.expert=3"), ("config.mesh.expert = 3", "model.num_experts = 4")),
    ("train", (*TEXT, "--config.mesh.fsdp=2"), ("config.mesh", "divisor of the number of devices, 1")),
    ("train", (*TEXT, "--config.mesh.data=3"), ("config.mesh.data = 3", "wanted 1", "1 devices")),
    ("preflight", (*PRESET, "--topology=v5q:2x2"), ("--topology=v5q:2x2", "did you mean")),
    ("preflight", (*PRESET, "--config.mesh.expert=5"), ("config.mesh.expert = 5", "model.num_experts = 32")),
    ("preflight", (*PRESET, "--slots=4"), ("--slots", "prefill or decode")),
    ("preflight", (*PRESET, "--program=decode", "--search"), ("--search", "--program=train")),
    ("preflight", (*PRESET, "--program=serve"), ("program", "serve", "decode")),
    ("preflight", (*PRESET, "--memory_gb=24"), ("--memory_gb", "--program=offload")),
    ("preflight", (*PRESET, "--program=offload", "--topology=v5e:2x2"), ("--topology", "train or prefill or decode")),
    ("preflight", (*PRESET, "--program=offload", "--memory_gb=1"), ("memory of 1.00 GB", "at least", "reserve 1.00")),
    ("preflight", (*PRESET, "--program=offload", "--budget=9"), ("--budget=9", "from 1 to 8")),
    ("retrieval.study", ("--workdir=new", "--seeds=a"), ("--seeds=a", "number")),
    ("retrieval.study", ("--workdir=new", "--seeds=\u00b2"), ("--seeds=", "number")),
    ("retrieval.study", ("--workdir=new", "--longest=100"), ("--longest=100", "1024")),
    ("difficulty.study", ("--config=configs/difficulty.py", "--workdir=new", "--seeds=1,a"), ("--seeds=a", "number")),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_changes_nothing(place, name, arguments, words):
  (place / "empty").mkdir(exist_ok=True)
  (place / "latin1").mkdir(exist_ok=True)
  (place / "latin1" / "bad.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 100)
  (place / "more").mkdir(exist_ok=True)
  for index in range(40):
    (place / "more" / f"{index}.txt").write_text("".join(f"other {index} words {n} entirely\n" for n in range(200)))
  before = files(place / "run")
  process = program(place, name, *(SMALL if name == "train" else ()), *arguments)
  assert process.returncode in (1, 2) and process.stdout == ""
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: ") and all(word in line for word in words), line
  assert files(place / "run") == before
  assert not (place / "new" / "config.json").exists()


def test_a_plan_for_24_gb_needs_no_compiler(place):
  flags = ("--program=offload", "--memory_gb=24", "--budget=2", "--context=8192", "--config.adapt.weights=nf4")
  process = program(place, "preflight", *PRESET, *flags)
  assert process.returncode == 0, process.stderr
  result = json.loads(process.stdout.splitlines()[-1])
  # 3 x 4096 x 3840 weights of 4.5 bits; the embedding and the head are in bfloat16.
  assert result["expert_bytes"] == 3 * 4096 * 3840 * 9 // 16
  assert result["weight_bytes"]["embedding"] == 65_536 * 4096 * 2
  assert result["experts"] == 32 * 32 and result["taken_per_token"] == 64
  assert result["resident_bytes"] <= 24e9 < result["resident_bytes"] + result["expert_bytes"]
  assert "experts in host memory" in process.stderr


@pytest.mark.parametrize(
  ("topology", "words"),
  [
    ("v5p:2x3x7", ("--topology=v5p:2x3x7", "as TPUs are sold")),
    ("v5p:4x4x4", ("config.mesh", "fsdp * expert * sequence * model = 128", "devices, 64")),
  ],
)
def test_a_preflight_for_what_is_not_there_is_one_line(place, topology, words):
  pytest.importorskip("libtpu")
  process = program(place, "preflight", *PRESET, f"--topology={topology}")
  assert process.returncode == 2 and process.stdout == ""
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: ") and all(word in line for word in words), line


def test_a_run_without_its_checkpoint_says_so(place):
  (place / "bare").mkdir()
  for name in ("config.json", "run.json"):
    (place / "bare" / name).write_bytes((place / "run" / name).read_bytes())
  process = program(place, "evaluate", "--workdir=bare")
  assert process.returncode == 2 and "no checkpoint" in process.stderr and len(process.stderr.splitlines()) == 1
