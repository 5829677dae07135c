"""The tokenizer of an imported model: the `tokenizer.json` that comes with it, run by the library of that name.

It is taken as it is, also where it normalises text. A run's file has one key more than the original, "moe_lab",
with the ids that begin and end a document, so that it can be used alone.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_lab.data.tokenizer import RUN_FILES, SPACE, Tokenizer, class_of_text
from moe_lab.errors import UserError
from moe_lab.interop.extra import need
from moe_lab.strict_json import parse

_PROBE = "def f(x):\n\treturn x  # \u00e9 \u4e2d \U0001f600 <s> 123"  # a broken one may fail at its first text only
_LEAST_SHARE = 0.9  # of a model's ids that its tokenizer has: vocabularies are rounded up, but not by more


def with_ends(text: str, begin: str | int | None, end: str | int | None) -> bytes:
  """Returns a run's tokenizer file.

  Args:
    text: of the original tokenizer.json.
    begin, end: of a document, the tokens or their ids. Where none begins one, the one that ends it does.

  Raises:
    ValueError: it is not such a file, or does not know these tokens.
  """
  library = _called(need("tokenizers").Tokenizer.from_str, text)
  ids = {}
  for name, token in (("bos", end if begin is None else begin), ("eos", end)):
    ids[name] = library.token_to_id(token) if isinstance(token, str) else token
    if ids[name] is None:
      raise ValueError(f"it has no token {token!r}" if token else "nothing says which token ends a text")
  return json.dumps(json.loads(text) | {"moe_lab": ids}, ensure_ascii=False).encode()


class ImportedTokenizer(Tokenizer):
  """As `Tokenizer`. Ids of the model that the tokenizer does not have are empty."""

  file_name = RUN_FILES[1]

  def __init__(self, model: bytes, vocab_size: int):
    """Loads a run's tokenizer file.

    Args:
      model: its bytes.
      vocab_size: V of the model.

    Raises:
      ValueError: it is not such a file.
      UserError: it does not fit the model.
    """
    self.model, self.vocab_size = model, vocab_size
    self.fingerprint = hashlib.sha256(model).hexdigest()
    content = parse(model)
    ends = content.pop("moe_lab", None) if isinstance(content, dict) else None
    if not isinstance(ends, dict) or not all(
      type(ends.get(name)) is int and ends[name] >= 0 for name in ("bos", "eos")
    ):
      raise ValueError("it does not say which ids begin and end a document: wanted the one that convert makes of it")
    library = need("tokenizers").Tokenizer
    self._library = _called(library.from_str, json.dumps(content))
    self._library.encode_special_tokens = True  # in a text they are text
    self._library.no_truncation()
    self._library.no_padding()
    self.bos_id, self.eos_id = ends["bos"], ends["eos"]
    self.pad_id = self.eos_id
    self.begins_texts = _called(self._library.encode, "a").ids[:1] == [self.bos_id]
    _called(self._library.encode, _PROBE)
    pieces = {token: piece for piece, token in self._library.get_vocab(with_added_tokens=True).items()}
    most = max(pieces, default=0) + 1
    if most > vocab_size or max(self.bos_id, self.eos_id) >= vocab_size or len(pieces) < _LEAST_SHARE * vocab_size:
      raise UserError(
        f"the tokenizer has {len(pieces)} ids up to {most - 1}: it does not fit a model with {vocab_size}"
      )
    added = self._library.get_added_tokens_decoder()
    self._special = {token for token, entry in added.items() if entry.special} | {self.bos_id, self.eos_id}
    self._pieces = [pieces.get(token, "") for token in range(vocab_size)]
    by_bytes = '"ByteLevel"' in json.dumps(content.get("decoder"))
    letters = _byte_letters()
    self._bytes = []
    for token, piece in enumerate(self._pieces):
      if token in self._special:
        self._bytes.append(b"")
      elif token in added:
        self._bytes.append(piece.encode())
      elif by_bytes:
        self._bytes.append(bytes(letters[letter] for letter in piece))
      elif _is_byte(piece):
        self._bytes.append(bytes([int(piece[3:5], 16)]))
      else:
        self._bytes.append(piece.replace(SPACE, " ").encode())

  def encode(self, text: str) -> np.ndarray:
    try:
      return np.asarray(_called(self._library.encode, text, add_special_tokens=False).ids, np.int32)
    except ValueError as error:
      raise UserError(f"the tokenizer cannot read a text: {error}") from None

  def piece_texts(self) -> list[str]:
    return [
      piece if token in self._special else self._bytes[token].decode(errors="replace")
      for token, piece in enumerate(self._pieces)
    ]

  def _class_name(self, token: int) -> str:
    try:
      return class_of_text(self._bytes[token].decode())
    except UnicodeDecodeError:
      return "byte"


def _called(function: Callable, *args, **settings) -> Any:
  """Returns what a function of the library returns; whatever is wrong is a ValueError."""
  try:
    return function(*args, **settings)
  except BaseException as error:
    # It has no type of its own, and a panic of its Rust code is not even an Exception.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise ValueError(str(error)) from None


def _is_byte(piece: str) -> bool:
  return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _byte_letters() -> dict[str, int]:
  """Returns the byte that each letter of a byte-level piece stands for (GPT-2).

  Printable bytes stand for themselves; the others are the letters from U+0100 on, in order.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
