"""Bytes of tokenizers: what is not one is refused in words, and no parser of it crashes the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from moe_lab.data.imported_tokenizer import with_ends
from moe_lab.data.tokenizer import train_tokenizer
from tests.fuzz.fuzzing import VALUES, each, examples, mutated

ROOT = Path(__file__).parents[2]
TEXTS = [f"def function_{i}(x):\n  return x + {i}  # höher als çela, 中文 und \U0001f600\n" for i in range(100)]


class Child:
  """A process that loads tokenizers; another one where it has crashed."""

  def __init__(self):
    self._process = None

  def outcome(self, kind: str, data: bytes, vocab_size: int = 320) -> str:
    if self._process is None:
      command = [sys.executable, "-m", "tests.fuzz.tokenizer_child"]
      environment = os.environ | {"PYTHONPATH": str(ROOT)}
      self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment,
      )  # fmt: skip
    self._process.stdin.write(json.dumps([kind, data.hex(), vocab_size]) + "\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline().strip()
    if not answer:
      error = self._process.communicate()[1]
      code, self._process = self._process.returncode, None
      raise AssertionError(f"exit {code}: {error[-2000:]}")
    return answer

  def close(self):
    if self._process is not None:
      self._process.communicate()


@pytest.fixture(scope="module")
def child():
  child = Child()
  yield child
  child.close()


@examples(150, 20_000)
def test_sentencepiece_models(child, tmp_path, count):
  valid = train_tokenizer(TEXTS, 320, tmp_path).model
  assert child.outcome("model", valid) == "loaded"
  outcomes = set()
  each(mutated([valid]) | st.binary(max_size=60), count, lambda data: outcomes.add(child.outcome("model", data)))
  assert outcomes == {"refused", "loaded"}  # a piece's score may well change


@examples(150, 10_000)
def test_imported_tokenizers(child, count):
  tokenizers = pytest.importorskip("tokenizers")
  vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrst")} | {"<s>": 20, "<0x41>": 21}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")][:0], byte_fallback=True))
  by_bytes = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  by_bytes.pre_tokenizer, by_bytes.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
  by_bytes.add_special_tokens(["<s>"])
  valid = [with_ends(one.to_str(), "<s>", 21) for one in (model, by_bytes)]
  assert child.outcome("json", valid[0], 22) == "loaded"
  ends = st.builds(
    lambda value: json.dumps(json.loads(valid[0]) | {"moe_lab": value}).encode(),
    VALUES | st.fixed_dictionaries({"bos": VALUES, "eos": VALUES}),
  )
  keys = st.sampled_from(sorted(json.loads(valid[1])))
  other = st.builds(
    lambda key, value: json.dumps(json.loads(valid[1]) | {key: value}).encode(), keys, VALUES
  )  # fmt: skip
  strategy = mutated(valid) | ends | other | VALUES.map(lambda value: json.dumps(value).encode())

  def check(data):
    child.outcome("json", data, 22)

  each(strategy, count, check)
