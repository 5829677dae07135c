"""Bytes of data files: what is whole is read as it was written, what is not is one line, or left out."""

import json

import pytest
from array_record.python import array_record_module
from hypothesis import strategies as st

from moe_lab.config.schema import Config
from moe_lab.data.sources import open_source
from moe_lab.infer.request import Request
from moe_lab.infer.responses import read_prompts
from tests.fuzz.fuzzing import VALUES, answered, each, examples, mutated

TEXTS = ["one", "zwei\u2028drei", "", "{curly", "four \U0001f600"]
TALK = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}


def array_record_bytes(path, options) -> bytes:
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for text in TEXTS:
    writer.write(text.encode() or b"x")
  writer.close()
  return path.read_bytes()


def lines(*values) -> bytes:
  return b"\n".join(json.dumps(value, ensure_ascii=False).encode() for value in values)


def surrogates_aside(value) -> bool:
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    return False
  return True


def check_documents(kind: str, path, data: bytes) -> None:
  path.write_bytes(data)
  found = []
  for skip in (False, True):
    with answered("config.data.sources"):
      source = open_source(f"{kind}:{path}", skip=skip)
      found.append([source[i].text for i in range(len(source))])
      assert all(text and text.encode() for text in found[-1])
      assert source.manifest()[0]["bytes"] == len(data)
      assert skip or source.skipped.count == 0
  if len(found) == 2:  # whole files are the same either way
    assert found[0] == found[1]


@examples(150, 10_000)
@pytest.mark.parametrize("kind", ["text", "jsonl", "chat"])
def test_texts_and_lines(tmp_path, kind, count):
  valid = {
    "text": "\n".join(TEXTS).encode(),
    "jsonl": lines(*({"text": text} for text in TEXTS)),
    "chat": lines(TALK, {"messages": [{"role": "assistant", "content": "a"}]}),
  }[kind]
  any_lines = st.lists(VALUES.filter(surrogates_aside), max_size=4).map(lambda values: lines(*values))
  keys = {"text": VALUES, "messages": st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES}) | VALUES)}
  shaped = st.fixed_dictionaries({}, optional=keys).filter(surrogates_aside).map(lambda value: lines(value, value))
  strategy = mutated([valid]) | any_lines | shaped | st.binary(max_size=40)
  each(strategy, count, lambda data: check_documents(kind, tmp_path / "a.jsonl", data))


@examples(60, 4000)
def test_array_records(tmp_path, count):
  valid = [
    array_record_bytes(tmp_path / "a.array_record", options)
    for options in ("group_size:1,uncompressed", "group_size:1", "group_size:4", "group_size:2,brotli:3")
  ]

  def check(data):
    check_documents("array_record", tmp_path / "a.array_record", data)

  each(mutated(valid) | st.binary(max_size=200), count, check)


@examples(150, 10_000)
def test_prompts(tmp_path, count):
  fields = [
    {"prompt": "a", "budget": 2, "seed": 7, "stop": ["x"], "temperature": 0.5, "max_tokens": 3, "top_k": 1},
    {"prompt": "\u2028", "max_experts": 2, "stop": "y", "top_p": 0.5, "min_p": 0},
  ]
  names = fields[0].keys() | fields[1].keys()
  shaped = st.fixed_dictionaries({"prompt": VALUES}, optional={name: VALUES for name in names - {"prompt"}}).filter(
    surrogates_aside
  )
  strategy = mutated([lines(*fields)]) | shaped.map(lines) | st.binary(max_size=40)

  def check(data):
    for suffix in (".jsonl", ".txt"):
      path = (tmp_path / "prompts").with_suffix(suffix)
      path.write_bytes(data)
      prompts = []
      with answered(str(path)):
        prompts = read_prompts(path)
      for place, prompt, changes in prompts:
        assert place.startswith(str(path)) and isinstance(prompt, str)
        assert changes.keys() <= names and all(isinstance(text, str) for text in changes.get("stop", ()))
        with answered(*names):
          Request([1], **changes).check(Config())

  each(strategy, count, check)
