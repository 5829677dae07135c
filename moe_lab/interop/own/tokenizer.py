"""Our sentencepiece tokenizer as the files that transformers reads: tokenizer.json, its settings, how a text ends."""

import json

from moe_lab.data.tokenizer import SPACE, Tokenizer


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns the files by name, tokenizer.model among them.

  A sentencepiece BPE model is a list of pieces, the earlier the sooner merged; here it is written as the pairs that
  make each. A text begins with the token that begins a document, as our models were trained.
  """
  texts = tokenizer.piece_texts()
  pieces = [text.replace(" ", SPACE) for text in texts]
  ids = {piece: token for token, piece in enumerate(pieces)}
  control = [token for token, size in enumerate(tokenizer.bytes_per_token()) if size == 0]
  merges = []
  for token, piece in enumerate(pieces):  # ids are in order of merging
    if token not in control and not piece.startswith("<0x"):
      pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
      merges += [list(pair) for pair in pairs if all(part in ids and ids[part] not in control for part in pair)]
  named = {f"{name}_token": pieces[getattr(tokenizer, f"{name}_id")] for name in ("bos", "eos", "pad")}
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
  begin = named["bos_token"]
  content = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": token, "content": pieces[token]} | plain for token in control],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    "pre_tokenizer": None,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {begin: {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}},
    },
    "decoder": {
      "type": "Sequence",
      "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
      ],
    },
    "model": {
      "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
      "fuse_unk": False, "byte_fallback": True, "ignore_merges": False, "vocab": ids, "merges": merges,
    },
  }  # fmt: skip
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
  ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
  return {
    "generation_config.json": json.dumps(ends, indent=2).encode(),
    "tokenizer.model": tokenizer.model,
    "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
    "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
  }
