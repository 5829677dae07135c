"""The bigram baseline is made once for the same data, and anew for others."""

import pytest

from moe_lab.config.schema import DataConfig
from moe_lab.data.loader import open_data
from moe_lab.evaluate import bigram


def test_the_report_is_made_once_for_the_same_data(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(bigram, "_REPORTS", {})
  counted = lambda data, make=bigram.bigram_baseline: made.append(1) or make(data)  # noqa: E731
  monkeypatch.setattr(bigram, "bigram_baseline", counted)
  for index in range(30):
    lines = [f"def function_{index}_{n}(x):\n  return x + {index * n}\n" for n in range(40)]
    (tmp_path / f"{index}.txt").write_text("".join(lines))

  def data(seq_len):
    config = DataConfig(sources=(f"text:{tmp_path}/*.txt",), vocab_size=300, seq_len=seq_len)
    return open_data(config, tmp_path / "cache")

  first, again = bigram.bigram_report(data(32)), bigram.bigram_report(data(32))
  assert first == again and len(made) == 1
  direct = bigram.bigram_loss(bigram.bigram_baseline(data(32)), data(32), "test")
  assert (first["bigram_test_loss"], first["bigram_test_bits_per_byte"]) == pytest.approx(direct)
  made.clear()
  assert bigram.bigram_report(data(64))["bigram_loss"] != first["bigram_loss"] and len(made) == 1
  first["bigram_loss"] = 0.0  # a caller's own copy
  assert again == bigram.bigram_report(data(32))
