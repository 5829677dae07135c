"""The tokenizer files of a checkpoint folder: which are carried along, and what a run makes of them."""

from collections.abc import Mapping
from pathlib import Path

from moe_lab.data.imported_tokenizer import ImportedTokenizer, with_ends
from moe_lab.data.tokenizer import Tokenizer
from moe_lab.errors import UserError
from moe_lab.interop.hf.files import read_json

CARRIED = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def of_folder(folder: Path, raw: Mapping, vocab_size: int) -> Tokenizer | None:
  """Returns the tokenizer of a checkpoint, or None where it has none.

  Args:
    folder: of the checkpoint.
    raw: its config.json, which may say what begins and ends a text.
    vocab_size: V.

  Raises:
    UserError: it cannot be used, or does not fit the model.
  """
  path = folder / "tokenizer.json"
  if path.is_file():
    settings = folder / "tokenizer_config.json"
    settings = read_json(settings) if settings.is_file() else {}
    begin, end = (_token(settings, raw, name) for name in ("bos", "eos"))
    return of_text(path.read_text(encoding="utf-8"), begin, end, vocab_size, str(path))
  path = folder / "tokenizer.model"
  if not path.is_file():
    return None
  try:
    tokenizer = Tokenizer(path.read_bytes())
  except ValueError as error:
    raise UserError(f"{path}: {error}; wanted a tokenizer.json beside it") from None
  if tokenizer.vocab_size != vocab_size:
    raise UserError(f"{path} has {tokenizer.vocab_size} ids: it does not fit a model with {vocab_size}")
  return tokenizer


def of_text(text: str, begin: str | int | None, end: str | int | None, vocab_size: int, where: str) -> Tokenizer:
  """Returns the tokenizer of a tokenizer.json; `begin` and `end` as in `with_ends`. Raises as `of_folder`."""
  try:
    return ImportedTokenizer(with_ends(text, begin, end), vocab_size)
  except UserError as error:
    raise UserError(f"{where}: {error}") from None
  except Exception as error:  # the library has no type of its own
    raise UserError(f"{where} cannot be used as a tokenizer: {error}") from None


def _token(settings: Mapping, raw: Mapping, name: str) -> str | int | None:
  token = settings.get(f"{name}_token")
  if isinstance(token, Mapping):
    token = token.get("content")
  if token is not None:
    return token
  found = raw.get(f"{name}_token_id")
  return found[0] if isinstance(found, list) else found
