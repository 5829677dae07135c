"""Loads tokenizers whose bytes come on stdin, in a process that may crash; says of each what came of it."""

import json
import sys

import numpy as np

from moe_lab.data.imported_tokenizer import ImportedTokenizer
from moe_lab.data.tokenizer import Tokenizer
from moe_lab.errors import UserError

TEXT = "def f(x):\n  return \u2581é\U0001f600 <s> <0x41>"


def outcome(kind: str, data: bytes, vocab_size: int) -> str:
  try:
    tokenizer = Tokenizer(data) if kind == "model" else ImportedTokenizer(data, vocab_size)
  except (ValueError, UserError):
    return "refused"
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and all(0 <= token < tokenizer.vocab_size for token in ids)
  assert kind == "json" or tokenizer.decode(ids) == TEXT
  tokenizer.decode(range(tokenizer.vocab_size))
  assert len(tokenizer.bytes_per_token()) == len(tokenizer.piece_texts()) == len(tokenizer.class_of_token())
  return "loaded"


def main() -> None:
  for line in sys.stdin:
    kind, text, vocab_size = json.loads(line)
    try:
      print(outcome(kind, bytes.fromhex(text), vocab_size), flush=True)
    except UserError:  # of a text that it cannot read
      print("refused", flush=True)


if __name__ == "__main__":
  main()
