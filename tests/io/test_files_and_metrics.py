import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.errors import UserError
from moe_lab.io.files import dump_json, write_text
from moe_lab.io.writers import MetricsWriter, read_metrics


def test_json_is_strict_and_knows_arrays():
  text = dump_json(
    {
      "nan": math.nan,
      "inf": np.float32(np.inf),
      "bf16": jnp.bfloat16(1.5),
      "i": np.int64(3),
      "rows": jnp.array([[1.0, jnp.nan]]),
      "t": (1, "x"),
      "no": None,
      "yes": np.bool_(True),
    }
  )
  assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
    "nan": None,
    "inf": None,
    "bf16": 1.5,
    "i": 3,
    "rows": [[1.0, None]],
    "t": [1, "x"],
    "no": None,
    "yes": True,
  }
  with pytest.raises(TypeError, match="object"):
    dump_json(object())


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  write_text(path, "old")
  with pytest.raises(TypeError):
    write_text(path, 3)
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_records_come_back_and_reach_tensorboard(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write({"kind": "train", "step": 1, "loss": np.float32(2.5), "load": np.ones((2, 3))})
    # Flushed line by line: a reader sees it at once.
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 2.5, "load": [[1.0] * 3] * 2}]
    writer.write({"kind": "train", "step": 2, "loss": float("nan")})
  assert read_metrics(tmp_path)[1]["loss"] is None
  assert list((tmp_path / "tensorboard").glob("events*"))


def test_resume_drops_what_will_be_written_again(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write({"kind": "train", "step": step, "loss": step / 3})
  before = read_metrics(tmp_path)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "step": 6, "lo')  # killed here
  assert read_metrics(tmp_path) == before
  with MetricsWriter(tmp_path) as writer:
    writer.resume(3)
    assert read_metrics(tmp_path) == before[:3]
    for step in range(4, 6):
      writer.write({"kind": "train", "step": step, "loss": step / 3})
  assert read_metrics(tmp_path) == before


def test_a_torn_line_is_mended_before_the_next_record(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
  with MetricsWriter(tmp_path) as writer:
    writer.write({"kind": "eval", "step": 2})
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_damage_elsewhere_names_the_line(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(UserError, match="line 2"):
    read_metrics(tmp_path)
  assert read_metrics(tmp_path / "absent") == []
