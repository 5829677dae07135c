"""The tokenizer: nothing lost, the same model every time, one line for each mistake."""

import argparse
import datetime
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from moe_lab.data import tokenizer as tokenizer_module
from moe_lab.data.tokenizer import load_tokenizer, train_tokenizer
from moe_lab.errors import ConfigError

TEXTS = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, datetime, typing)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache):
  return train_tokenizer(TEXTS, 600, cache)


@pytest.mark.parametrize("text", [
  "", " ", "\n", "\n\n\n", "\t\tx\t", "  lead and trail  ", "a\r\nb\r", "def f(x):\n    return x\n", "x\u2581 \u2581y",
  "\0", "\ufeffé e\u0301 \u00a0\u3000\ufb01 \u00bd", "日本語 😀\U0010ffff", "<s></s><unk><pad><0x41>",
  "\u2047 \u2585",
])  # fmt: skip
def test_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode("utf-8"))
  assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]).any()


def test_round_trip_of_random_unicode(tokenizer):
  rng = np.random.default_rng(0)
  for _ in range(300):
    high = rng.choice([128, 0x3000, 0x110000])
    points = [int(p) for p in rng.integers(0, high, 40) if not 0xD800 <= p < 0xE000]
    text = "".join(map(chr, points))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_ids_are_distinct_and_empty(tokenizer):
  controls = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
  assert len(controls) == 3
  assert tokenizer.decode(list(controls)) == ""
  assert not tokenizer.bytes_per_token()[list(controls)].any()


def test_classes_and_pieces(tokenizer):
  classes, pieces = tokenizer.class_of_token(), tokenizer.piece_texts()
  assert classes.shape == (600,) and len(pieces) == 600
  named = {piece: tokenizer.class_names[c] for piece, c in zip(pieces, classes, strict=True)}
  assert named["    "] == named["\n"] == "whitespace"
  assert named[" the"] == "word_start" and named["self"] == named["_"] == "word_inside"
  assert named["0"] == "digit" and named["("] == "punctuation" and named["<0x41>"] == "byte"
  assert named["<s>"] == "special"


def test_bytes_that_are_not_utf8_are_shown_as_such(tokenizer):
  byte = tokenizer.piece_texts().index("<0xFF>")
  assert tokenizer.decode([byte]) == "\ufffd"


def test_order_does_not_matter_and_the_second_call_loads(tokenizer, cache, tmp_path, monkeypatch):
  again = train_tokenizer(TEXTS[::-1], 600, tmp_path)  # trained anew, elsewhere
  assert again.fingerprint == tokenizer.fingerprint
  monkeypatch.setattr(tokenizer_module, "_train", lambda *_: pytest.fail("trained again"))
  assert train_tokenizer(TEXTS[::-1], 600, cache).fingerprint == tokenizer.fingerprint
  assert [path.suffix for path in (cache / "tokenizers").iterdir()] == [".model"]


def test_a_spoilt_cache_is_replaced(tmp_path):
  first = train_tokenizer(TEXTS, 500, tmp_path)
  [path] = (tmp_path / "tokenizers").iterdir()
  path.write_bytes(first.model[:1000])
  assert train_tokenizer(TEXTS, 500, tmp_path).fingerprint == first.fingerprint
  assert path.read_bytes() == first.model


def test_sizes_that_the_text_does_not_give(tmp_path):
  with pytest.raises(ConfigError, match=r"^config.data.vocab_size = 4000: wanted at most (\d+), .*") as caught:
    train_tokenizer(["a few words, a few words"] * 3, 4000, tmp_path)
  most = int(str(caught.value).split("at most ")[1].split(",")[0])
  assert train_tokenizer(["a few words, a few words"] * 3, most, tmp_path).vocab_size == most
  with pytest.raises(ConfigError, match=r"^config.data.vocab_size = 100: wanted at least \d+, "):
    train_tokenizer(TEXTS, 100, tmp_path)


def test_a_tokenizer_given_by_path(tokenizer, tmp_path):
  path = tmp_path / "my.model"
  path.write_bytes(tokenizer.model)
  assert load_tokenizer(str(path), 600).fingerprint == tokenizer.fingerprint
  with pytest.raises(ConfigError, match="^config.data.vocab_size = 512: wanted 600, the size of data.tokenizer = "):
    load_tokenizer(str(path), 512)
  for broken in (b"", b"junk" * 100, tokenizer.model[: len(tokenizer.model) // 2]):
    path.write_bytes(broken)
    with pytest.raises(ConfigError, match="^config.data.tokenizer = .* is not a sentencepiece model"):
      load_tokenizer(str(path), 600)
  with pytest.raises(ConfigError, match="^config.data.tokenizer = .*No such file"):
    load_tokenizer(str(tmp_path / "none.model"), 600)


def test_a_lossy_tokenizer_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(tokenizer_module._SETTINGS, "normalization_rule_name", "nmt_nfkc")
  path = tmp_path / "lossy.model"
  path.write_bytes(tokenizer_module._train(TEXTS, 600))
  with pytest.raises(ConfigError, match="^config.data.tokenizer = .*it changes text"):
    load_tokenizer(str(path), 600)


def test_the_library_is_silent(tmp_path):
  program = (
    "from moe_lab.data.tokenizer import *\n"
    "import pathlib, argparse\n"
    "train_tokenizer([pathlib.Path(argparse.__file__).read_text()], 400, sys.argv[1])\n"
    "for job in (lambda: train_tokenizer(['a b'], 4000, sys.argv[1]), lambda: Tokenizer(b'junk')):\n"
    "  try: job()\n"
    "  except Exception: pass\n"
  )
  done = subprocess.run([sys.executable, "-c", "import sys\n" + program, str(tmp_path)], capture_output=True, text=True,
                        check=True)  # fmt: skip
  assert done.stdout == done.stderr == ""
