"""The tokenizer of an imported model, as the rest of the code sees it."""

import json

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import tokenizers

from moe_lab.data import imported_tokenizer
from moe_lab.data.imported_tokenizer import ImportedTokenizer, with_ends
from moe_lab.data.tokenizer import load_tokenizer
from moe_lab.errors import ConfigError, UserError
from moe_lab.infer.text import TextStream

TEXT = "def größe(x):\n  return 'naïve \u00bd \U0001f600 ' * 12  # <|end|> \u2581\r\n"


@pytest.fixture(scope="module")
def original():
  """A byte-level tokenizer.json of 300 ids, the last two special."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=298, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator([TEXT * 3], trainer)
  tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
  return tokenizer.to_str()


@pytest.fixture(scope="module")
def tokenizer(original):
  size = tokenizers.Tokenizer.from_str(original).get_vocab_size()
  return ImportedTokenizer(with_ends(original, "<|begin|>", "<|end|>"), size + 6)


def test_no_byte_is_lost(tokenizer):
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and len(ids) < len(TEXT.encode())
  assert tokenizer.decode(ids) == TEXT
  assert tokenizer.bytes_per_token()[ids].sum() == len(TEXT.encode())


def test_control_tokens_are_empty_and_never_come_of_a_text(tokenizer):
  ids = tokenizer.encode("<|begin|><|end|>")
  assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
  assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "<|begin|><|end|>"


def test_ids_beyond_the_tokenizers_own_are_empty(tokenizer):
  last = tokenizer.vocab_size - 1
  assert tokenizer.decode([last]) == "" and tokenizer.piece_texts()[last] == ""
  assert len(tokenizer.piece_texts()) == len(tokenizer.class_of_token()) == tokenizer.vocab_size


def test_classes(tokenizer):
  def name(text):
    (token,) = tokenizer.encode(text)
    return tokenizer.class_names[tokenizer.class_of_token()[token]]

  assert [name(t) for t in ("x", "7", "(", " ")] == ["word_inside", "digit", "punctuation", "whitespace"]
  first_of_two = (
    tokenizer.encode("\u00bd")[0] if len(tokenizer.encode("\u00bd")) == 2 else tokenizer.encode("\u7b2c")[0]
  )
  assert tokenizer.class_names[tokenizer.class_of_token()[first_of_two]] == "byte"


def test_text_comes_in_whole_characters(tokenizer):
  stream = TextStream(tokenizer.decode)
  parts = [stream.push(token) for token in tokenizer.encode(TEXT)]
  stream.finish()
  assert stream.text == TEXT and not any("\ufffd" in part for part in parts)


def test_a_file_is_enough_to_load_it(tokenizer, tmp_path):
  path = tmp_path / tokenizer.file_name
  path.write_bytes(tokenizer.model)
  again = load_tokenizer(str(path), tokenizer.vocab_size)
  assert again.fingerprint == tokenizer.fingerprint and again.bos_id == tokenizer.bos_id


def test_what_does_not_fit_is_a_line(original, tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(tokenizer.model)
  for size in (100, 2000):
    with pytest.raises(UserError, match=f"does not fit a model with {size}"):
      load_tokenizer(str(path), size)
  for content in ("{", "{}", original, json.dumps({"moe_lab": {"bos": 1, "eos": 1}})):
    path.write_text(content)
    with pytest.raises(ConfigError, match="data.tokenizer"):
      load_tokenizer(str(path), 300)
  with pytest.raises(ValueError, match="no token '<none>'"):
    with_ends(original, None, "<none>")


def test_whether_texts_begin_is_as_its_own_file_says(original, tokenizer):
  assert not tokenizer.begins_texts
  library = tokenizers.Tokenizer.from_str(original)
  begin = library.token_to_id("<|begin|>")
  library.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
  )
  begun = ImportedTokenizer(with_ends(library.to_str(), "<|begin|>", "<|end|>"), tokenizer.vocab_size)
  assert begun.begins_texts and begun.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_a_panic_of_the_library_is_a_mistake_of_the_file():
  class PanicException(BaseException):
    """As pyo3 has it: no Exception."""

  def raises(error):
    raise error

  with pytest.raises(ValueError, match="index out of bounds"):
    imported_tokenizer._called(raises, PanicException("index out of bounds"))
  with pytest.raises(KeyboardInterrupt):
    imported_tokenizer._called(raises, KeyboardInterrupt())
