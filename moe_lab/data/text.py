"""Text as training batches: sources, splits and tokenizer put together."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset, WindowShuffleIterDataset

from moe_lab.config.schema import DataConfig
from moe_lab.data.chat import ChatFiles, ids_and_counted, ids_of
from moe_lab.data.formats import DocumentSource
from moe_lab.data.iterator import Loader
from moe_lab.data.ngram import Pairs
from moe_lab.data.packing import batches_of_rows, pack_rows
from moe_lab.data.sources import open_source
from moe_lab.data.splits import SPLITS, split_documents
from moe_lab.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moe_lab.errors import ConfigError, visible
from moe_lab.types import Batch

CACHED_TOKENS = 256 * 1024 * 1024  # kept in memory by each source and split, two bytes each at V <= 65,536
_SHUFFLED_ROWS, _SHUFFLED_TOKENS = 1024, 2**18  # rows are shuffled in windows of at most so many rows and tokens
_PAIRS_AT_ONCE = 1 << 20


class TokenisedDocuments:
  """The documents of one split of a source as int32 [tokens] of `chat.ids_of`; tokenised once while they fit."""

  def __init__(self, source: DocumentSource, positions: np.ndarray, tokenizer: Tokenizer):
    self._source, self._positions, self._tokenizer = source, positions, tokenizer
    small = tokenizer.vocab_size <= 1 << 16 and not isinstance(source, ChatFiles)
    self._dtype = np.uint16 if small else np.int32
    self._cache: dict[int, np.ndarray] = {}
    self._room = CACHED_TOKENS

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> np.ndarray:
    if index in self._cache:
      return self._cache[index].astype(np.int32)
    ids = ids_of(self._source[self._positions[index]], self._tokenizer)
    if len(ids) <= self._room:
      self._room -= len(ids)
      self._cache[index] = ids.astype(self._dtype)
    return ids


class _Texts(Sequence):
  """The texts of some documents of several sources, read when asked for."""

  def __init__(self, places: list[tuple[DocumentSource, int]]):
    self._places = places

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index):
    source, position = self._places[index]
    return source[position].text


class TextData:
  """Documents of one or more sources. The interface is `loader.Data`."""

  def __init__(self, config: DataConfig, cache_dir: str | os.PathLike):
    self.config = config
    sources = [open_source(spec, skip=config.corrupt == "skip") for spec in config.sources]
    for source in sources:
      if source.skipped.count:
        logging.warning("config.data.corrupt = 'skip': of %s %s", source.spec, visible(str(source.skipped)))
    splits = split_documents(
      [(document.text for document in source) for source in sources], config.validation_share, config.test_share
    )
    for source, split in zip(sources, splits, strict=True):
      if not len(split["train"]):
        raise ConfigError(
          "data.sources",
          source.spec,
          f"a document to train on (the hash of their text puts all {len(source)} into validation or test)",
        )
    if config.tokenizer:
      self.tokenizer = load_tokenizer(config.tokenizer, config.vocab_size)
    else:
      texts = _Texts([(source, i) for source, split in zip(sources, splits, strict=True) for i in split["train"]])
      self.tokenizer = train_tokenizer(texts, config.vocab_size, cache_dir)
    self.vocab_size = self.tokenizer.vocab_size
    self.fingerprint = self.tokenizer.fingerprint
    self.class_names = self.tokenizer.class_names
    self.manifest = [
      {
        "source": source.spec,
        "documents": len(source),
        "splits": {name: len(split[name]) for name in SPLITS},
        "files": source.manifest(),
      }
      | (source.skipped.manifest() if config.corrupt == "skip" else {})
      for source, split in zip(sources, splits, strict=True)
    ]
    self._left = [source.digest() for source in sources if source.skipped.count]
    self._documents = {
      name: [
        TokenisedDocuments(source, split[name], self.tokenizer) for source, split in zip(sources, splits, strict=True)
      ]
      for name in SPLITS
    }
    self._class_of_token = self.tokenizer.class_of_token()
    self._packed: dict[str, Batch] = {}
    self._has_answers = any(isinstance(source, ChatFiles) for source in sources)

  def train_loader(self, batch_size: int) -> Loader:
    """See `loader.Data`. Weights are shares of the documents drawn."""
    parts = [
      grain.MapDataset.source(documents).seed(self._seed(index)).shuffle().repeat()
      for index, documents in enumerate(self._documents["train"])
    ]
    weights = self.config.weights or [len(documents) for documents in self._documents["train"]]
    documents = grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]
    documents = documents.map(lambda tokens: {"tokens": tokens})
    # Threads and read-ahead would only get in the way: documents are mostly in memory.
    documents = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows = ConcatThenSplitIterDataset(documents, length_struct={"tokens": self.config.seq_len + 1})
    # A document fills many rows; unmixed, a batch would be all but one document, and its gradient so much noise.
    window = max(1, min(_SHUFFLED_ROWS, _SHUFFLED_TOKENS // self.config.seq_len))
    rows = WindowShuffleIterDataset(rows, window_size=window, seed=self.config.seed % 2**32)
    return Loader(rows.map(self._row), batch_size, self._identity())

  def eval_batches(self, split: str, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """See `loader.Data`. Rows come in a fixed random order, so that the first few batches stand for the split."""
    if split not in self._packed:
      documents = (documents[i] for documents in self._documents[split] for i in range(len(documents)))
      stored, segments = pack_rows(documents, self.config.seq_len + 1)
      tokens, counted = ids_and_counted(stored)
      classes = np.where(segments > 0, self._class_of_token[tokens], 0).astype(np.int32)
      self._packed[split] = Batch(tokens, segments, classes, counted if self._has_answers else None)
    rows = self._packed[split]
    order = np.random.Generator(np.random.Philox(0)).permutation(len(rows.tokens))
    return batches_of_rows(rows, order, batch_size, max_batches)

  def train_token_pairs(self) -> Iterator[Pairs]:
    """See `loader.Data`."""
    held, size = [], 0
    for documents in self._documents["train"]:
      for index in range(len(documents)):
        held.append(ids_and_counted(documents[index])[0])
        size += len(held[-1])
        if size >= _PAIRS_AT_ONCE:
          yield _join(held)
          held, size = [], 0
    if held:
      yield _join(held)

  def _row(self, packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens, counted = ids_and_counted(packed["tokens"])
    row = {"tokens": tokens, "segments": packed["tokens_segment_ids"], "classes": self._class_of_token[tokens]}
    return row | {"counted": counted} if self._has_answers else row

  def _seed(self, index: int) -> int:
    # Sources of equal length would otherwise be shuffled alike.
    return int(np.random.SeedSequence([self.config.seed % 2**64, index]).generate_state(1)[0])

  def _identity(self) -> str:
    """Returns a digest of everything the stream of rows depends on."""
    config = dataclasses.asdict(self.config) | {"sources": None, "tokenizer": self.fingerprint}
    del config["corrupt"]  # what was left out counts, and not that it might have been
    # Content, not paths: a run may move to another machine.
    files = [[file["sha256"] for file in entry["files"]] for entry in self.manifest]
    return hashlib.sha256(json.dumps([config, files, *self._left], sort_keys=True).encode()).hexdigest()[:16]


def _join(documents: list[np.ndarray]) -> Pairs:
  return np.concatenate([d[:-1] for d in documents]), np.concatenate([d[1:] for d in documents])
