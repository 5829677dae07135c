"""experiments.adapt as a user runs it: every mode, what loads afterwards, and every mistake in one line."""

import json

import numpy as np
import pytest

from tests.experiments.test_programs import SMALL, files, program, result_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with two corpora, `text` and `other`, and a trained run, `run`."""
  folder = tmp_path_factory.mktemp("adapt")
  for name, line in (
    ("text", "def function_{0}_{1}(x):\n  return x + {2}\n"),
    ("other", "Satz {0} von {1}, nicht {2}.\n"),
  ):
    (folder / name).mkdir()
    for index in range(40):
      lines = [line.format(index, number, index * number) for number in range(30)]
      (folder / name / f"{index}.txt").write_text("\n".join(lines))
  result_of(program(folder, "train", *SMALL, "--config.data.sources=text:text", "--workdir=run"))
  return folder


def adapt(place, mode, *arguments, base="run"):
  return program(place, "adapt", f"--mode={mode}", f"--base={base}", *arguments)


@pytest.mark.slow
def test_a_quantised_run_evaluates_and_generates(place):
  before = files(place / "run")
  made = result_of(adapt(place, "quantise", "--config.adapt.weights=int4", "--workdir=int4"))
  assert files(place / "run") == before
  assert made["tensors"]["experts"] == 6 and made["drift"]["loss_after"] > 0
  report = json.loads((place / "int4" / "adaptation.json").read_text())
  assert report["bits_per_weight"] == made["bits_per_weight"]
  evaluated = result_of(program(place, "evaluate", "--workdir=int4", "--split=validation"))
  assert evaluated["val_loss"] == pytest.approx(made["drift"]["loss_after"], rel=1e-5)
  answer = result_of(program(place, "generate", "--workdir=int4", "--prompt=def ", "--max_tokens=6"))
  assert answer["tokens"] <= 6
  again = adapt(place, "quantise", "--workdir=int4")
  assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.slow
def test_adapters_on_4_bits_and_merged(place):
  options = (
    "--config.data.sources=text:other",
    "--config.adapt.weights=nf4",
    "--config.adapt.lora_rank=4",
    "--config.adapt.router=held",
    "--config.train.steps=4",
    "--workdir=lora",
  )
  made = result_of(adapt(place, "lora", *options))
  assert made["rank"] == {"attention": 4, "experts": 2} and made["steps"] == 4
  assert {"drift_target", "drift_source"} <= made.keys()
  assert result_of(adapt(place, "lora", *options))["drift_target"] == made["drift_target"]  # done: nothing changes
  with np.load(place / "lora" / "adapter.npz") as adapter:
    assert "moe_layers/moe/gate_a_EDI" in adapter.files and "moe_layers/moe/router_DE" in adapter.files
  evaluated = result_of(program(place, "evaluate", "--workdir=lora", "--split=validation"))
  assert evaluated["val_loss"] == pytest.approx(made["val_loss"], rel=1e-5)
  merged = result_of(adapt(place, "merge", "--workdir=merged", base="lora"))
  assert merged["mode"] == "merge"
  plain = result_of(program(place, "evaluate", "--workdir=merged", "--split=validation"))
  assert plain["val_loss"] == pytest.approx(made["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_an_adapter_alone_goes_with_its_base(place):
  options = ("--config.adapt.lora_on=experts", "--config.adapt.router=frozen", "--config.train.steps=3")
  made = result_of(adapt(place, "lora", *options, "--workdir=experts_only"))
  arguments = ("--adapter=experts_only/adapter.npz", "--workdir=by_file")
  result_of(adapt(place, "merge", *arguments))
  evaluated = result_of(program(place, "evaluate", "--workdir=by_file", "--split=validation"))
  assert evaluated["val_loss"] == pytest.approx(made["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_training_on_in_full(place):
  options = ("--config.data.sources=text:other", "--config.adapt.router=frozen", "--config.train.steps=4")
  made = result_of(adapt(place, "finetune", *options, "--workdir=tuned"))
  assert made["steps"] == 4 and made["drift_source"]["flips"] >= 0 and "adapter" not in made
  assert result_of(program(place, "evaluate", "--workdir=tuned", "--split=validation"))["val_loss"] > 0


@pytest.mark.slow
def test_the_drift_of_every_way_to_treat_the_router(place):
  options = (
    "--config.data.sources=text:other",
    "--config.train.steps=2",
    "--seeds=0",
    "--weights=1",
    "--workdir=drift",
  )
  made = result_of(program(place, "adapter_drift.study", "--base=run", *options))
  assert list(made["summary"]) == ["frozen", "trained", "held_1"]
  assert all(row["loss"] > 0 and row["source_router_kl"] >= 0 for row in made["summary"].values())
  assert json.loads((place / "drift" / "study.json").read_text())["summary"] == made["summary"]


@pytest.mark.slow
def test_dense_then_sparse_then_lazy(place):
  dense = ("--config.model.num_dense_layers=2", "--config.routing.method=topk", "--config.routing.k=1")
  result_of(program(place, "train", *SMALL, "--config.data.sources=text:text", *dense, "--workdir=dense"))
  sizes = ("--config.model.num_experts=8", "--config.model.expert_dim=256", "--config.routing.k=4")
  made = result_of(adapt(place, "upcycle", *sizes, "--workdir=sparse", base="dense"))
  assert (made["copies"], made["pieces"]) == (4, 2) and made["tensors"] == {"experts": 6}
  assert made["loss_after"] == pytest.approx(made["loss_before"], abs=1e-5)
  tuned = result_of(adapt(place, "finetune", "--config.train.steps=3", "--workdir=tuned_sparse", base="sparse"))
  assert tuned["val_loss"] > 0
  options = ("--config.routing.budget=2.5", "--config.train.steps=3", "--workdir=lazy")
  lazy = result_of(adapt(place, "retrofit", *options, base="tuned_sparse"))
  found = json.loads((place / "lazy" / "adaptation.json").read_text())["fewer_experts"]
  assert found["full"]["loss"] == pytest.approx(tuned["val_loss"], rel=1e-5)
  assert lazy["val_loss"] == pytest.approx(found["policy"][0]["loss"], rel=1e-5)
  evaluated = result_of(program(place, "evaluate", "--workdir=lazy", "--split=validation"))
  assert evaluated["val_loss"] == pytest.approx(lazy["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--mode=upcycle", "--base=run", "--workdir=new"), ("--base=run", "all dense")),
    (("--mode=retrofit", "--base=run", "--workdir=new"), ("--base=run", "routing.method = topk", "dynamic")),
    (("--base=run", "--workdir=new"), ("--mode", "quantise", "lora")),
    (("--mode=lora", "--workdir=new"), ("--base", "run to adapt")),
    (("--mode=lroa", "--base=run", "--workdir=new"), ("--mode=lroa", "did you mean 'lora'")),
    (("--mode=lora", "--base=rum", "--workdir=new"), ("--base=rum", "config.json")),
    (("--mode=lora", "--base=run", "--config=configs/quickstart.py", "--workdir=new"), ("--config=", "overrides")),
    (("--mode=lora", "--base=run", "--config.adapt.lora_rnk=3", "--workdir=new"), ("lora_rnk", "lora_rank")),
    (("--mode=lora", "--base=run", "--config.adapt.lora_on=atention", "--workdir=new"), ("lora_on", "attention")),
    (("--mode=lora", "--base=run", "--config.model.dim=32", "--workdir=new"), ("model.dim", "32", "16")),
    (("--mode=lora", "--base=run", "--config.data.vocab_size=301", "--workdir=new"), ("data", "301")),
    (("--mode=quantise", "--base=run", "--config.adapt.weights=int3", "--workdir=new"), ("adapt.weights", "int4")),
    (("--mode=quantise", "--base=run", "--workdir=text"), ("--workdir=text", "is there already")),
    (("--mode=quantise", "--base=run", "--step=5", "--workdir=new"), ("step 5", "6")),
    (("--mode=merge", "--base=run", "--workdir=new"), ("--base=run", "adapters")),
    (("--mode=merge", "--base=run", "--adapter=run/config.json", "--workdir=new"), ("--adapter=", "adapter.npz")),
    (("--mode=finetune", "--base=run", "--config.adapt.lora_rank=2", "--workdir=new"), ("finetune", "lora")),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_changes_nothing(place, arguments, words):
  before = files(place / "run")
  process = program(place, "adapt", *arguments)
  assert process.returncode == 2 and process.stdout == "", process.stderr
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: ") and all(word in line for word in words), line
  assert files(place / "run") == before and not (place / "new").exists()
