"""The card of an export says what its run has on record, and that it does not know the rest."""

import hashlib
import json
import re
import shutil

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub")

import huggingface_hub as hub

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.errors import UserError
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.run import open_run
from moe_lab.train.convert import export_run
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state, parameter_counts
from tests.evaluate.random_run import CONTEXT, VOCAB, random_run

FILES = [
  {"file": "/home/somebody/a|b.py", "sha256": "ab" * 32, "bytes": 1200, "license": "PSF-2.0"},
  {"file": "c.py", "sha256": "cd" * 32, "bytes": 34, "license": "PSF-2.0"},
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  folder = tmp_path_factory.mktemp("card")
  return random_run(folder / "run", folder / "cache")


@pytest.fixture
def run(original, tmp_path):
  """A run of step 1 with random weights and nothing else."""
  return shutil.copytree(original, tmp_path / "run")


def note(run, **fields):
  info = json.loads((run / "run.json").read_text())
  (run / "run.json").write_text(json.dumps(info | fields))


def exported(run, name="exported", **options):
  result = export_run(run, run.parent / name, **{"family": None, "dtype": None, "step": None} | options)
  return (run.parent / name / result["card"]).read_text()


def rows(card, title):
  """Returns the cells of a section's tables, line by line."""
  section = re.search(rf"\n## {title}\n(.*?)(\n## |\Z)", card, re.DOTALL)[1]
  lines = [line for line in section.splitlines() if line.startswith("| ")]
  return [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines]


def test_what_a_bare_run_does_not_know_is_said(run):
  card = exported(run)
  front = hub.ModelCard(card).data.to_dict()
  assert front == {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["moe_lab", "mixture-of-experts", "dynamic-routing"],
  }
  assert "Unknown: the run has no data manifest" in card and "Unknown: the run has no record of training" in card
  assert "None: the run has no evaluation on record" in card
  assert "None" not in card.replace("None: the run has no evaluation", "") and "nan" not in card
  shapes = dict(rows(card, "Architecture"))
  # Of 500 x 24 in and out, and two layers: norms, attention of 4 + 2 + 2 + 4 heads, 6 experts, router and policy.
  assert shapes["width"] == "24" and shapes["layers"] == "2, 2 with experts" and shapes["vocabulary"] == str(VOCAB)
  in_experts = 2 * 6 * 3 * 24 * 10
  total, active = (int(shapes[name].replace(",", "")) for name in list(shapes)[2:4])
  assert total - active == in_experts - in_experts * 2 // 6  # budget 2 of 6
  assert 2 * VOCAB * 24 + in_experts < total < 2 * VOCAB * 24 + in_experts + 10_000
  assert "`dynamic`: a token takes 1 to 4 of 6 experts" in card and "any from 1 to 4 can be asked for" in card
  assert f"sequences of {CONTEXT} tokens" in card and "was not tested for any of them" in card


def test_what_the_run_knows_is_told(run):
  note(run, data=[{"source": "text:/home/somebody/books", "documents": 7, "splits": {}, "files": FILES}])
  records = [{"kind": "train", "step": step, "tokens": 512.0 * step, "flops": 1.5e6 * step} for step in (1, 2)]
  (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  final = {
    "val_loss": 3.25, "val_bits_per_byte": 1.5, "val_mean_experts": 2.01, "bigram_loss": 4.0, "budget": 2.0,
    "test_loss": 3.5, "test_bits_per_byte": None, "test_mean_experts": 1.99, "result": {"steps": 1},
  }  # fmt: skip
  (run / "evaluation.json").write_text(json.dumps(final))
  row = {"budget": 2.0, "value": 0.5, "interval": [0.25, 0.75], "items": 8, "mean_experts": 2.5}
  tasks = {"gsm8k": {"metric": "exact", "by_budget": [row]}, "mmlu": {"skipped": "no data"}}
  for name, step in (("suite-small.json", 1), ("suite-small.step9.1.json", 9)):
    (run / name).write_text(json.dumps({"suite": f"small{step}", "step": step, "tasks": tasks}))
  note(run, launches=[{"git_hash": "f" * 40, "git_dirty": True}])
  card = exported(run)
  front = hub.ModelCard(card).data.to_dict()
  assert (front["license"], front["license_name"]) == ("other", "psf-2.0")
  digest = hashlib.sha256(f"{'ab' * 32}\n{'cd' * 32}".encode()).hexdigest()
  assert ["`text:books`", "7", "2", "1,234", "PSF-2.0", f"`{digest}`"] in rows(card, "Training data")
  assert ["`a\\|b.py`", "1,200", "PSF-2.0", f"`{'ab' * 32}`"] in rows(card, "Training data")
  assert "somebody" not in card and str(run.parent) not in card  # folders tell about people
  assert "By step 1: 512 tokens and 1.5e+06 FLOPs" in card
  assert ["validation", "3.2500", "1.5000", "2.0100", "4.0000"] in rows(card, "Evaluation")
  assert ["test", "3.5000", "unknown", "1.9900", "unknown"] in rows(card, "Evaluation")
  assert ["gsm8k", "exact", "2", "none", "0.5000 (0.2500 to 0.7500)", "8", "2.5000"] in rows(card, "Evaluation")
  assert "not asked: no data" in card and "small9" not in card
  assert f"`{'f' * 40}` with uncommitted changes" in card

  (run / "evaluation.json").write_text(json.dumps(final | {"result": {"steps": 5}}))
  assert "by step 5, which is not the step of this export (1)" in exported(run, "other")
  unknown = [*FILES[:1], FILES[1] | {"license": None}]
  note(run, data=[{"source": "text:books", "documents": 7, "splits": {}, "files": unknown, "skipped": 3}])
  card = exported(run, "unlicensed")
  assert "license" not in hub.ModelCard(card).data.to_dict() and "PSF-2.0, unknown" in card
  assert "could not be read: 3 files" in card


def test_the_card_of_an_imported_checkpoint_stays_and_ours_is_beside_it(run):
  (run / "imported").mkdir()
  (run / "imported" / "README.md").write_text("theirs")
  (run / "imported" / "LICENSE").write_text("their terms")
  assert "written by moe_lab" in exported(run)
  folder = run.parent / "exported"
  assert (folder / "README.md").read_text() == "theirs" and (folder / "README.moe_lab.md").is_file()
  assert (folder / "LICENSE").read_text() == "their terms"
  note(run, base={"workdir": "/home/somebody/first", "step": 3})  # what was made of it is another model
  assert "step 3 of the run `first`" in exported(run, "adapted")
  folder = run.parent / "adapted"
  assert (folder / "README.base.md").read_text() == "theirs" and "first" in (folder / "README.md").read_text()
  assert (folder / "LICENSE.base").is_file() and not (folder / "LICENSE").exists()


def test_records_that_cannot_be_read_are_a_line_and_nothing_is_written(run):
  (run / "evaluation.json").write_text("[]")
  with pytest.raises(UserError, match="evaluation.json: wanted an object"):
    exported(run)
  assert not (run.parent / "exported").exists()


def test_loading_is_done_as_the_card_says(run):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  card = exported(run)
  code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("FOLDER", str(run.parent / "exported"))
  said = []
  exec(code, {"print": said.append})
  assert said and "Once" in said[0]


@pytest.mark.slow
def test_parameters_of_a_dense_model(tmp_path):
  config = Config(
    ModelConfig(dim=8, num_layers=2, num_dense_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, dense_dim=12),
    RoutingConfig(method="topk", k=2),
    DataConfig(vocab_size=32),
  )
  state = initial_state(config, make_optimizer(config.train))
  total, active = parameter_counts(state.params, config, 2)
  assert total == active
  with open_run(tmp_path / "run", config, fingerprint="", manifest=[], argv=["train"]):
    with Checkpointer(tmp_path / "run", 1) as checkpointer:
      checkpointer.save(1, state, {})
  card = exported(tmp_path / "run")
  assert "None: all layers are dense." in card and "mixture-of-experts" not in card
  assert f"| parameters | {total:,} |" in card and "has no tokenizer of text" in card
