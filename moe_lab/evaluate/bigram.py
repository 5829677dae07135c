"""The baseline every run prints: how far a bigram gets on the same tokens."""

import json

import numpy as np

from moe_lab.data.loader import Data
from moe_lab.data.ngram import KneserNeyBigram, pairs, tune

_REPORTS: dict[str, dict] = {}  # by what the data are: the runs of a study, in one process, share them


def bigram_report(data: Data) -> dict:
  """Returns bigram_loss and bigram_test_loss, nats per token, and the same as ..._bits_per_byte (None without text)."""
  key = json.dumps([repr(data.config), data.fingerprint, data.manifest], sort_keys=True)
  if key not in _REPORTS:
    bigram, report = bigram_baseline(data), {}
    for name, split in (("bigram", "validation"), ("bigram_test", "test")):
      report[f"{name}_loss"], report[f"{name}_bits_per_byte"] = bigram_loss(bigram, data, split)
    _REPORTS[key] = report
  return dict(_REPORTS[key])


def bigram_baseline(data: Data) -> KneserNeyBigram:
  """Returns a Kneser-Ney bigram of the whole training split, its discounts tuned on the validation split."""
  return tune(data.train_token_pairs(), pairs(data.eval_batches("validation", 8)), data.vocab_size)


def bigram_loss(bigram: KneserNeyBigram, data: Data, split: str) -> tuple[float, float | None]:
  """Returns nats per token and bits per byte (None without text), on exactly the pairs the model is judged on."""
  prev, target = pairs(data.eval_batches(split, 8))
  nll = bigram.nll(prev, target)
  if data.tokenizer is None:
    return float(nll.mean()), None
  return float(nll.mean()), float(nll.sum() / np.log(2) / data.tokenizer.bytes_per_token()[target].sum())
