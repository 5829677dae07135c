"""Our tokenizer, exported: transformers' library cuts texts as we do."""

import json
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

import tokenizers

from moe_lab.data.tokenizer import train_tokenizer
from moe_lab.interop.own.tokenizer import files

MODULES = ("textwrap", "heapq", "bisect", "calendar", "colorsys", "csv", "queue", "sched", "shlex", "string")


def test_texts_are_cut_alike(tmp_path):
  texts = [Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
  ours = train_tokenizer(texts[:8], 700, tmp_path)
  written = files(ours)
  theirs = tokenizers.Tokenizer.from_str(written["tokenizer.json"].decode())
  for text in (*texts, "naïve \u00bd \U0001f600\r\n\t  12345  ", "", " ", "a"):
    found = theirs.encode(text)
    assert found.ids == [ours.bos_id, *ours.encode(text)], text[:40]
    assert theirs.decode(found.ids) == text
  assert json.loads(written["tokenizer_config.json"])["eos_token"] == "</s>"
