"""Data that cannot be read: it stops the program, or is left out and counted, the same at every start."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.data.loader import open_data
from moe_lab.data.sources import open_source
from moe_lab.errors import ConfigError, UserError
from moe_lab.io.run import load_run
from moe_lab.train.loop import train

pytestmark = pytest.mark.fault("corrupt data shard")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 20)) for i in range(30)]


def bad_jsonl(folder):
  lines = [json.dumps({"text": text}).encode() for text in TEXTS]
  lines[3] = lines[3][:-5]
  lines[7] = b'{"text": "\xff"}'
  lines[8] = b'{"txt": "a"}'
  lines[9] = b'{"no text": 1}'
  (folder / "a.jsonl").write_bytes(b"\n".join(lines))
  return [3, 7, 8, 9], {"is not JSON": 1, "is not UTF-8": 1, "has not the right fields": 2}, "'a.jsonl' line 4 is not"


def bad_chat(folder):
  lines = [json.dumps({"messages": [{"role": "assistant", "content": text}]}).encode() for text in TEXTS]
  lines[5] = b"[]"
  (folder / "a.jsonl").write_bytes(b"\n".join(lines))
  return [5], {"is not an object": 1}, "'a.jsonl' line 6 is not an object"


def bad_text(folder):
  for i, text in enumerate(TEXTS):
    (folder / f"{i:02}.txt").write_text(text)
  (folder / "04.txt").write_bytes(b"abc\xff")
  return [4], {"is not UTF-8": 1}, "'04.txt' has an invalid byte at offset 3"


def unreadable(folder):
  for i, text in enumerate(TEXTS):
    (folder / f"{i:02}.txt").write_text(text)
  (folder / "02.txt").unlink()
  (folder / "02.txt").symlink_to("/proc/self/mem")  # a file that even root cannot read from its beginning
  return [2], {"cannot be read": 1}, "02.txt': Input/output error"


def write_records(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  for record in records:
    writer.write(record)
  writer.close()


def truncated_records(folder):
  write_records(folder / "a.array_record", [text.encode() for text in TEXTS[:10]])
  whole = (folder / "a.array_record").read_bytes()
  (folder / "a.array_record").write_bytes(whole[: len(whole) // 2])
  write_records(folder / "b.array_record", [text.encode() for text in TEXTS[10:]])
  return list(range(10)), {"is no whole ArrayRecord": 1}, "'a.array_record': "


def bad_record(folder):
  write_records(folder / "a.array_record", [b"\xff" if i == 6 else text.encode() for i, text in enumerate(TEXTS)])
  path = folder / "a.array_record"
  whole = bytearray(path.read_bytes())
  at = whole.index(TEXTS[11].encode())
  whole[at] ^= 1
  path.write_bytes(whole)
  return [6, 11], {"is not UTF-8": 1, "is no whole ArrayRecord": 1}, "'a.array_record[6]' has an invalid byte"


CASES = {
  "jsonl": bad_jsonl, "chat": bad_chat, "text": bad_text, "text unreadable": unreadable,
  "array_record truncated": truncated_records, "array_record": bad_record,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_policies(tmp_path, case, caplog):
  missing, reasons, first = CASES[case](tmp_path)
  if case == "text unreadable" and not os.path.exists("/proc/self/mem"):
    pytest.skip("no /proc")
  spec = f"{case.split()[0]}:{tmp_path}"
  with pytest.raises(ConfigError) as caught:
    open_source(spec)
  assert first in str(caught.value) and "\n" not in str(caught.value)
  config = DataConfig(sources=(spec,), vocab_size=290, seq_len=15, validation_share=0.2, test_share=0.2, corrupt="skip")
  data, again = open_data(config, tmp_path / ".cache"), open_data(config, tmp_path / ".cache")
  assert data.manifest == again.manifest
  [entry] = data.manifest
  assert entry["documents"] == sum(entry["splits"].values()) == len(TEXTS) - len(missing)
  assert entry["skipped"] == sum(reasons.values()) and first in entry["skipped_first"][0]
  assert {x["reason"]: x["count"] for x in entry["skipped_by_reason"]} == reasons
  kept = [document.text.removeprefix("<assistant>\n") for document in open_source(spec, skip=True)]
  assert kept == [text for i, text in enumerate(TEXTS) if i not in missing]
  [line] = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
  assert f"config.data.corrupt = 'skip': of {spec} {sum(reasons.values())} left out: " in line and first in line
  np.testing.assert_array_equal(next(data.train_loader(2)).tokens, next(again.train_loader(2)).tokens)


def test_what_is_whole_is_the_same_under_both(tmp_path):
  bad_text(tmp_path)
  (tmp_path / "04.txt").write_text(TEXTS[4])
  config = DataConfig(sources=(f"text:{tmp_path}",), vocab_size=290, seq_len=15)
  abort, skip = (open_data(dataclasses.replace(config, corrupt=c), tmp_path / ".cache") for c in ("abort", "skip"))
  assert skip.manifest == [abort.manifest[0] | {"skipped": 0, "skipped_by_reason": [], "skipped_first": []}]
  skip.train_loader(2).set_state(abort.train_loader(2).get_state())


def test_all_of_it_corrupt(tmp_path):
  (tmp_path / "a.jsonl").write_text("x\n" * 8)
  with pytest.raises(ConfigError, match=r"at least one document .*1 file\(s\) read; 8 left out: .*; .*, and 3 more\)"):
    open_source(f"jsonl:{tmp_path}", skip=True)
  with pytest.raises(ConfigError, match="data.corrupt = 'ignore': wanted one of abort, skip"):
    DataConfig(corrupt="ignore")


def test_a_position_in_what_broke_since_is_refused(tmp_path):
  bad_text(tmp_path)
  open_data(DataConfig(sources=(f"text:{tmp_path}",), vocab_size=290, seq_len=15, corrupt="skip"), tmp_path / ".cache")
  [model] = (tmp_path / ".cache" / "tokenizers").iterdir()
  config = DataConfig((f"text:{tmp_path}",), vocab_size=290, tokenizer=str(model), seq_len=15, corrupt="skip")
  position = open_data(config, tmp_path).train_loader(2).get_state()
  open_data(config, tmp_path).train_loader(2).set_state(position)
  (tmp_path / "20.txt").write_bytes(b"\xff")
  with pytest.raises(UserError, match="config.data: wanted the documents"):
    open_data(config, tmp_path).train_loader(2).set_state(position)


@pytest.mark.slow
def test_a_run_leaves_the_same_out_at_every_launch_and_refuses_what_broke_since(tmp_path):
  folder, workdir = tmp_path / "texts", tmp_path / "run"
  folder.mkdir()
  bad_text(folder)
  config = Config(
    model=ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, num_experts=2, expert_dim=4),
    routing=RoutingConfig(k_max=2, budget=1.5, warmup_steps=1),
    data=DataConfig(sources=(f"text:{folder}",), vocab_size=290, seq_len=15, validation_share=0.2, corrupt="skip"),
    train=TrainConfig(steps=2, batch_size=2, warmup_steps=1, log_every=1, eval_batches=1),
  )
  arguments = config, workdir, tmp_path / "cache", sys.argv
  with pytest.raises(SystemExit):
    train(*arguments, stop_at=1)
  [entry] = load_run(workdir)[1]["data"]
  assert entry["skipped"] == 1 and entry["skipped_first"] == ["'04.txt' has an invalid byte at offset 3"]
  (folder / "20.txt").write_bytes(b"\xff")
  with pytest.raises(UserError, match="config.data: wanted the documents|tokenizer .* is not"):
    train(*arguments)
  (folder / "20.txt").write_text(TEXTS[20])
  assert train(*arguments)["steps"] == 2
