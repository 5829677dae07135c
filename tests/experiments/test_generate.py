"""What `generate` does between the command line and the engine."""

import io
import os
import signal
import sys

import numpy as np
import pytest

from experiments import generate
from moe_lab.errors import UserError
from moe_lab.train.load import LoadedModel, TextModel
from tests.infer.models import VOCAB, make


class Letters:
  """A tokenizer whose ids from 4 on are characters."""

  bos_id, eos_id = 2, 3

  def encode(self, text):
    return np.array([4 + ord(letter) % (VOCAB - 4) for letter in text], np.int32)

  def decode(self, ids):
    return "".join(chr(93 + token) for token in ids if token > 3)


@pytest.fixture
def model():
  config, params, state = make("windowed")
  return generate._Model(TextModel(LoadedModel(config, None, params, state, 2.0, 1, ""), Letters()))


def flags(*arguments):
  for name in generate.FLAGS:
    generate.FLAGS[name].unparse()
  generate.FLAGS(["generate", *arguments])


def talk(model, monkeypatch, typed: bytes) -> dict:
  flags("--chat", "--max_tokens=12", "--context=64")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
  return generate._chat(model)


def test_a_mistake_in_a_file_names_its_line(model, tmp_path):
  flags(f"--prompts={tmp_path}/p.jsonl")
  for line, words in (
    ('{"prompt": "a", "max_tokens": -500}', "p.jsonl, line 2: max_tokens=-500: wanted"),
    ('{"prompt": "\\ud800"}', "p.jsonl, line 2: prompt: wanted text in UTF-8"),
    ('{"prompt": "a", "budget": 99}', "p.jsonl, line 2: budget=99: wanted"),
  ):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match=words):
      generate._file(model, tmp_path / "p.jsonl")


def test_lengths_that_differ_a_little_share_their_programs(model):
  flags()
  assert [model.engine(1, tokens, 1).capacity for tokens in (2, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]


def test_a_cache_that_no_memory_holds_is_one_line(model):
  flags()
  with pytest.raises(UserError, match="no room for 8 x 1073741824 tokens"):
    model.engine(8, 10**9, 1)


def test_a_line_that_is_not_utf8_does_not_end_the_talk(model, monkeypatch, capsys):
  assert talk(model, monkeypatch, b"caf\xe9\nab\n")["turns"] == 1
  assert "error: prompt: wanted text in UTF-8, but character 4 is none" in capsys.readouterr().err


def test_an_interrupt_ends_a_response_and_the_talk_goes_on(model, monkeypatch):
  build, calls, before = model.engine, [], signal.getsignal(signal.SIGINT)

  def engine(*arguments, **named):
    built = build(*arguments, **named)
    decode = built._decode

    def interrupted(*arguments):
      calls.append(arguments)
      made = decode(*arguments)
      if len(calls) == 1:  # the old cache is given away, and nobody has the new one yet
        os.kill(os.getpid(), signal.SIGINT)
      return made

    built._decode = interrupted
    return built

  monkeypatch.setattr(model, "engine", engine)
  result = talk(model, monkeypatch, b"ab\ncd\n")
  assert result["turns"] == 2 and result["tokens"] > 2
  assert signal.getsignal(signal.SIGINT) is before
