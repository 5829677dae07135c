"""Mutated files of a run: one line, or what was written."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from moe_lab.config.load import load
from moe_lab.config.resolve import to_json
from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.lock import RunLock
from moe_lab.io.run import load_run, open_run
from moe_lab.io.writers import MetricsWriter, read_metrics
from tests.fuzz.fuzzing import VALUES, answered, each, examples, mutated

RECORDS = [{"kind": "train", "step": step, "loss": 3.0, "load": [[0.5, 0.5]]} for step in (1, 2, 3)]


@pytest.fixture
def workdir(tmp_path):
  workdir = tmp_path / "run"
  open_run(workdir, Config(), fingerprint="ab" * 32, manifest=[{"file": "a"}], argv=["x"]).close()
  return workdir


@examples(150, 10_000)
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_config_and_run(workdir, name, count):
  path = workdir / name
  valid = path.read_bytes()
  keys = st.sampled_from(sorted(json.loads(valid)))
  shaped = st.builds(lambda key, value: json.dumps(json.loads(valid) | {key: value}).encode(), keys, VALUES)

  def check(data):
    path.write_bytes(data)
    with answered(str(workdir)):
      config, info = load_run(workdir)
      assert isinstance(config, Config) and isinstance(info, dict)
    with answered(str(workdir), "config.", "tokenizer"):
      open_run(workdir, Config(), fingerprint="ab" * 32, manifest=[], argv=["x"]).close()
    (workdir / "config.json").write_text(to_json(Config()))
    assert not (workdir / "lock").exists()

  each(mutated([valid]) | shaped | VALUES.map(lambda value: json.dumps(value).encode()), count, check)


@examples(150, 10_000)
def test_metrics(tmp_path, count):
  path = tmp_path / "metrics.jsonl"
  valid = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
  line = st.fixed_dictionaries({}, optional={"kind": VALUES, "step": VALUES, "loss": VALUES}) | VALUES
  lines = st.lists(line, max_size=3).map(lambda values: "".join(json.dumps(v) + "\n" for v in values).encode())

  def check(data):
    path.write_bytes(data)
    with answered(str(path)):
      assert all(isinstance(record, dict) for record in read_metrics(tmp_path))
    with answered(str(path)):
      with MetricsWriter(tmp_path) as writer:
        writer.resume(1)
      assert all(record.get("step", 0) <= 1 for record in read_metrics(tmp_path))

  each(mutated([valid]) | lines, count, check)


@examples(100, 5000)
def test_locks(tmp_path, count):
  RunLock(tmp_path)
  path = tmp_path / "lock"
  valid = path.read_bytes()
  shaped = st.builds(
    lambda key, value: json.dumps(json.loads(valid) | {key: value}).encode(),
    st.sampled_from(sorted(json.loads(valid))),
    VALUES,
  )

  def check(data):
    path.write_bytes(data)
    with answered("is in use by process"):
      RunLock(tmp_path).release()
      assert not path.exists()

  each(mutated([valid]) | shaped, count, check)


@examples(20, 1000)
def test_the_json_side_of_a_checkpoint(tmp_path, count):
  state, meta = {"a": jnp.arange(4.0)}, {"loader": {"position": [1, None, "x"]}, "spent": {"flops": 1.5}}
  with Checkpointer(tmp_path, keep=1) as saver:
    saver.save(1, state, meta)
  files = [path for path in (tmp_path / "checkpoints" / "1" / "meta").rglob("*") if path.is_file()]
  path = next(path for path in files if b"position" in path.read_bytes())
  valid = path.read_bytes()
  keys = st.sampled_from(sorted(json.loads(valid)))
  shaped = st.builds(lambda key, value: json.dumps(json.loads(valid) | {key: value}).encode(), keys, VALUES)
  deep = st.integers(1, 5000).map(lambda n: b"[" * n + b"]" * n)

  def check(data):
    path.write_bytes(data)
    with answered("the checkpoint"), Checkpointer(tmp_path, keep=None) as reader:
      got, told, step = reader.restore(state)
      assert told == meta and step == 1 and got["a"].tolist() == [0, 1, 2, 3]

  check(valid)
  each(mutated([valid]) | shaped | deep | VALUES.map(lambda value: json.dumps(value).encode()), count, check)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a/" * 3000])
def test_names_that_no_folder_can_have(name):
  with answered("no run in"):
    load_run(Path(name))
    raise AssertionError("it was found")
  for spec in (f"{name}.py", f"{name}.py:arg"):
    with answered("--config="):
      load(spec)
      raise AssertionError("it was found")


def test_the_untouched_files_are_as_written(workdir):
  config, info = load_run(workdir)
  assert config == Config() and info["data"] == [{"file": "a"}]
  with MetricsWriter(workdir) as writer:
    for record in RECORDS:
      writer.write(record)
  assert read_metrics(workdir) == RECORDS
  with pytest.raises(UserError, match="the key 'kind' is there twice|wanted a JSON object"):
    (workdir / "metrics.jsonl").write_text('{"kind": "a", "kind": "b", "step": 1}\n')
    read_metrics(workdir)
