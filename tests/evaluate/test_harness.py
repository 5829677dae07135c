"""The harness's own Hugging Face model on the same weights: the same log-likelihoods and the same texts."""

import functools
import json
import os

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moe_lab.errors import UserError
from moe_lab.evaluate.harness import Harness
from moe_lab.evaluate.scoring import Scorer
from moe_lab.train.convert import export_run
from moe_lab.train.load import load_text_model
from tests.evaluate.random_run import CONTEXT, random_run, texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with texts, a run of random weights with a tokenizer, and its export."""
  folder = tmp_path_factory.mktemp("harness")
  random_run(folder / "run", folder / "cache")
  export_run(folder / "run", folder / "exported", family="moe_lab", dtype=None, step=None)
  _write_tasks(folder, texts())
  return folder


def _write_tasks(folder, texts):
  lines = [line.strip() for line in texts[0].splitlines() if len(line.strip()) > 30]
  choices = [
    {"question": lines[i], "choices": [lines[i + 1][:20], lines[i + 2][:9], lines[i + 3][:40], "a"], "gold": i % 4}
    for i in range(12)
  ]
  (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
  (folder / "letters.jsonl").write_text("\n".join(json.dumps(row | {"choices": list("ABCD")}) for row in choices))
  rolling = [{"text": texts[1][at : at + size]} for at, size in ((0, 20), (500, 90), (900, 400), (2000, 700))]
  (folder / "rolling.jsonl").write_text("\n".join(map(json.dumps, rolling)))
  (folder / "write.jsonl").write_text("\n".join(json.dumps({"text": text[:60], "rest": "x"}) for text in texts))


def _task(folder, name, **config):
  files = {"test": str(folder / f"{name}.jsonl")}
  common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
  return TaskManager(include_defaults=False).load([common | config])["tasks"]


def _tasks(folder):
  choice = dict(
    output_type="multiple_choice", doc_to_text="Q: {{question}}\nA:", doc_to_target="gold", doc_to_choice="choices",
    metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
  )  # fmt: skip
  rolling = dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=[
    {"metric": "word_perplexity"}, {"metric": "bits_per_byte"},
  ])  # fmt: skip
  write = dict(
    output_type="generate_until", doc_to_text="{{text}}", doc_to_target="rest", metric_list=[{"metric": "exact_match"}],
    generation_kwargs={"until": ["\n\n", "e "], "max_gen_toks": 20},
  )  # fmt: skip
  return (
    _task(folder, "choices", **choice)
    | _task(folder, "letters", **choice)
    | _task(folder, "rolling", **rolling)
    | _task(folder, "write", **write)
  )


@pytest.fixture(scope="module")
def harness(place):
  model = load_text_model(place / "run")
  make = lambda tokens: model.engine(slots=3, capacity=tokens)  # noqa: E731
  return Harness(Scorer(model.loaded.config, model.tokenizer, make, CONTEXT))


@pytest.mark.slow
def test_it_agrees_with_the_hugging_face_model(place, harness, monkeypatch):
  monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
  tasks = _tasks(place)
  theirs = HFLM(str(place / "exported"), device="cpu", dtype="float32", batch_size=4, trust_remote_code=True)
  assert theirs.max_length == harness.max_length
  ours, found = (evaluate(model, {"tasks": tasks}, bootstrap_iters=0) for model in (harness, theirs))
  for name in ("choices", "letters", "rolling"):
    for mine, its in zip(ours["samples"][name], found["samples"][name], strict=True):
      a, b = (np.array(sample["resps"], np.float64).reshape(-1) for sample in (mine, its))
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
  mine, its = ([sample["resps"] for sample in run["samples"]["write"]] for run in (ours, found))
  assert mine == its
  assert len({text for ((text,),) in mine}) > 3 and any(len(text) > 20 for ((text,),) in mine)
  for name, metrics in found["results"].items():
    values = {key: value for key, value in metrics.items() if isinstance(value, float)}
    assert {key: ours["results"][name][key] for key in values} == pytest.approx(values, rel=1e-4), name
  assert harness.compute.keys() == {
    (name, number) for name, task in tasks.items() for number in range(len(task.eval_docs))
  }


def test_what_a_task_asks_of_generation(harness):
  settings = functools.partial(harness._settings, end="</s>")
  greedy = settings({"until": "\n", "max_gen_toks": 7, "temperature": 0.7, "do_sample": False})
  assert greedy == {"temperature": 0.0, "max_tokens": 7, "stop": ("\n", "</s>"), "budget": None}
  drawn = settings({"do_sample": True, "top_p": 0.9, "seed": 3})
  assert drawn == {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_tokens": 256, "stop": ("</s>",), "budget": None}
  assert settings({"temperature": 0.5})["temperature"] == 0.5
  with pytest.raises(UserError, match="generation_kwargs: num_beams is not known here"):
    settings({"num_beams": 4})
