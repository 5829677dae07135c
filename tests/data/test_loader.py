"""The loader on text: what is in a batch, how sources mix, and resuming at any batch."""

import dataclasses
import json

import numpy as np
import pytest

from moe_lab.config.schema import DataConfig
from moe_lab.data import ngram, text
from moe_lab.data.loader import open_data
from moe_lab.data.splits import SPLITS
from moe_lab.errors import ConfigError, UserError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


def write_corpus(folder, count, prefix="", seed=0, words=60):
  folder.mkdir()
  rng = np.random.default_rng(seed)
  for i in range(count):
    text = prefix + " ".join(rng.choice(WORDS, rng.integers(5, words)))
    (folder / f"{i:03}.txt").write_text(text + "\n")
  return f"text:{folder}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("loader")


@pytest.fixture(scope="module")
def config(root):
  return DataConfig(sources=(write_corpus(root / "a", 60),), vocab_size=320, seq_len=31, validation_share=0.2,
                    test_share=0.2, seed=3)  # fmt: skip


@pytest.fixture(scope="module")
def data(config, root):
  return open_data(config, root)


def documents_of(data, batches):
  """Returns the documents of a stream, cut at begin tokens; the first and last may be parts."""
  stream = np.concatenate([b.tokens[b.segments > 0] for b in batches])
  starts = np.flatnonzero(stream == data.tokenizer.bos_id)
  return np.split(stream, starts[starts > 0])


def test_what_is_recorded(data, config):
  assert data.config is config and data.vocab_size == 320 and len(data.fingerprint) == 64
  [entry] = data.manifest
  assert entry["documents"] == 60 == sum(entry["splits"].values()) and len(entry["files"]) == 60
  json.dumps(data.manifest)


def test_shapes_segments_and_classes(data):
  batch = next(data.train_loader(4))
  tokens, segments, classes, _ = batch
  assert tokens.shape == segments.shape == classes.shape == (4, 32)
  assert tokens.dtype == segments.dtype == classes.dtype == np.int32
  assert (classes == data.tokenizer.class_of_token()[tokens]).all()
  # A segment number rises by one exactly where a document begins.
  assert (segments[:, 0] == 1).all()
  assert (np.diff(segments) == (tokens[:, 1:] == data.tokenizer.bos_id)).all()


def test_an_epoch_holds_each_training_document_once_and_the_next_is_shuffled_anew(data, monkeypatch):
  monkeypatch.setattr(text, "_SHUFFLED_ROWS", 1)  # rows as packed, or documents could not be read off them
  count = data.manifest[0]["splits"]["train"]
  loader = data.train_loader(2)
  documents = documents_of(data, [next(loader) for _ in range(150)])
  texts = [data.tokenizer.decode(document) for document in documents]
  first, second = texts[:count], texts[count : 2 * count]
  assert len(set(first)) == count and set(first) == set(second) and first != second
  assert all(d[0] == data.tokenizer.bos_id and d[-1] == data.tokenizer.eos_id for d in documents[:count])


def test_splits_share_no_text(data):
  parts = [data._documents[split][0] for split in SPLITS]
  seen = [{data.tokenizer.decode(part[i]) for i in range(len(part))} for part in parts]
  assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


@pytest.mark.parametrize("stop", [0, 1, 7, 40])
def test_resume_is_exact(data, config, root, stop):
  loader = data.train_loader(3)
  for _ in range(stop):
    next(loader)
  state = loader.get_state()
  assert json.loads(json.dumps(state)) == state
  expected = [next(loader) for _ in range(20)]
  resumed = open_data(config, root).train_loader(3)
  next(resumed)  # where it stood before does not matter
  resumed.set_state(state)
  assert resumed.get_state() == state
  for batch in expected:
    for got, want in zip(next(resumed), batch, strict=True):
      np.testing.assert_array_equal(got, want)


def test_resume_with_documents_longer_than_a_row(root, tmp_path):
  spec = write_corpus(tmp_path / "long", 12, seed=5, words=400)
  data = open_data(DataConfig(sources=(spec,), vocab_size=300, seq_len=8, validation_share=0.1, test_share=0.1), root)
  loader = data.train_loader(1)
  states, batches = [], []
  for _ in range(60):
    states.append(json.loads(json.dumps(loader.get_state())))
    batches.append(next(loader))
  for stop in range(0, 60, 7):
    loader.set_state(states[stop])
    for batch in batches[stop : stop + 5]:
      np.testing.assert_array_equal(next(loader).tokens, batch.tokens)


def test_a_position_in_other_data_is_refused(data, config, root):
  other = open_data(DataConfig(**{**config.__dict__, "seed": 4}), root).train_loader(3)
  with pytest.raises(UserError, match="^config.data: wanted the documents, seed, .* that the saved position"):
    other.set_state(data.train_loader(3).get_state())


def test_the_seed_decides_the_order(data, config, root):
  def stream(data):
    loader = data.train_loader(2)
    return np.stack([next(loader).tokens for _ in range(30)])

  np.testing.assert_array_equal(stream(data), stream(open_data(config, root)))
  assert (stream(data) != stream(open_data(DataConfig(**{**config.__dict__, "seed": 4}), root))).mean() > 0.5


def test_evaluation_is_one_pass_in_a_fixed_order(data):
  batches = list(data.eval_batches("validation", 4))
  again = list(data.eval_batches("validation", 4))
  assert all((x.tokens == y.tokens).all() for x, y in zip(batches, again, strict=True))
  assert all(b.tokens.shape == (4, 32) for b in batches)
  documents = data._documents["validation"][0]
  want = np.sort(np.concatenate([documents[i] for i in range(len(documents))]))
  np.testing.assert_array_equal(np.sort(np.concatenate([b.tokens[b.segments > 0] for b in batches])), want)
  assert all((b.tokens[b.segments == 0] == 0).all() and (b.classes[b.segments == 0] == 0).all() for b in batches)
  short = list(data.eval_batches("validation", 4, max_batches=2))
  assert len(short) == 2 and (short[1].tokens == batches[1].tokens).all()
  # The number of counted targets does not depend on the batch size.
  assert len(ngram.pairs(batches)[0]) == len(ngram.pairs(data.eval_batches("validation", 7))[0])


def test_training_pairs_are_those_of_whole_documents(data):
  chunks = list(data.train_token_pairs())
  prev, next_ = (np.concatenate(side) for side in zip(*chunks, strict=True))
  documents = [data._documents["train"][0][i] for i in range(len(data._documents["train"][0]))]
  assert len(prev) == sum(len(d) - 1 for d in documents)
  assert (prev == data.tokenizer.bos_id).sum() == len(documents)
  assert not (next_ == data.tokenizer.bos_id).any() and not (prev == data.tokenizer.eos_id).any()


def test_documents_mix_by_weight(root, tmp_path, monkeypatch):
  monkeypatch.setattr(text, "_SHUFFLED_ROWS", 1)
  first = write_corpus(tmp_path / "first", 40, "first ", 1, words=12)
  second = write_corpus(tmp_path / "second", 90, "second ", 2, words=12)

  def shares(weights):
    data = open_data(DataConfig(sources=(first, second), weights=weights, vocab_size=310, seq_len=31), root)
    loader = data.train_loader(4)
    documents = documents_of(data, [next(loader) for _ in range(250)])
    texts = [data.tokenizer.decode(d) for d in documents[:1000]]
    return np.mean([t.startswith("first ") for t in texts]), [e["splits"]["train"] for e in data.manifest]

  got, _ = shares((3.0, 1.0))
  assert abs(got - 0.75) < 0.01
  got, (a, b) = shares(())
  assert abs(got - a / (a + b)) < 0.01


def test_a_mixture_resumes_exactly(root, tmp_path):
  sources = tuple(write_corpus(tmp_path / str(i), 20 + i, seed=i) for i in range(3))
  data = open_data(DataConfig(sources=sources, weights=(1.0, 2.0, 0.5), vocab_size=310, seq_len=16), root)
  loader = data.train_loader(2)
  for _ in range(25):
    next(loader)
  resumed = data.train_loader(2)
  resumed.set_state(loader.get_state())
  for _ in range(50):
    np.testing.assert_array_equal(next(loader).tokens, next(resumed).tokens)


def test_a_given_tokenizer_and_a_wrong_one(data, config, tmp_path, root):
  path = tmp_path / "t.model"
  path.write_bytes(data.tokenizer.model)
  fields = {**config.__dict__, "tokenizer": str(path)}
  assert open_data(DataConfig(**fields), root).fingerprint == data.fingerprint
  with pytest.raises(ConfigError, match="config.data.vocab_size = 300: wanted 320"):
    open_data(DataConfig(**{**fields, "vocab_size": 300}), root)


def test_a_source_without_training_documents(config, root, tmp_path):
  # Of single-document sources, some fall into validation or test.
  for i in range(100):
    (tmp_path / "one.txt").write_text(f"document {i}\n")
    try:
      open_data(DataConfig(**{**config.__dict__, "sources": (*config.sources, f"text:{tmp_path}/one.txt")}), root)
    except ConfigError as error:
      assert "a document to train on" in str(error) and "one.txt" in str(error) and "\n" not in str(error)
      return
  pytest.fail("each of 100 documents was in the training split")


def test_the_standard_library_end_to_end(root):
  data = open_data(DataConfig(), root)
  loader = data.train_loader(16)
  assert next(loader).tokens.shape == (16, 257)
  text = data.tokenizer.decode(next(loader).tokens.ravel())
  assert "self" in text and "\ufffd" not in text[2:-2]
  assert {entry["source"] for entry in data.manifest} == {"stdlib"}
  tokens = np.concatenate([next(loader).tokens for _ in range(30)])
  assert data.tokenizer.bytes_per_token()[tokens].mean() > 2.4


def test_rows_are_shuffled_in_a_window_and_none_is_lost(data, monkeypatch):
  def rows(count):
    loader = data.train_loader(2)
    return [tuple(row) for _ in range(count // 2) for row in next(loader).tokens]

  shuffled = rows(512)
  assert shuffled == rows(512)
  monkeypatch.setattr(text, "_SHUFFLED_ROWS", 1)
  packed = rows(512)
  assert shuffled != packed
  monkeypatch.setattr(text, "_SHUFFLED_ROWS", 128)
  assert sorted(rows(512)) == sorted(packed)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63 - 1])
def test_any_seed_shuffles(config, data, root, seed):
  batch = next(open_data(dataclasses.replace(config, seed=seed), root).train_loader(4))
  assert not np.array_equal(batch.tokens, next(data.train_loader(4)).tokens)
