"""Conversations: the template, which tokens count, packing, and every broken line named."""

import json

import numpy as np
import pytest

from moe_lab.config.schema import DataConfig
from moe_lab.data.chat import Part, ids_and_counted, ids_of, templated
from moe_lab.data.loader import open_data
from moe_lab.data.sources import open_source
from moe_lab.errors import ConfigError

TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "One and one?"},
  {"role": "assistant", "content": "Two."},
  {"role": "user", "content": "And one?"},
  {"role": "assistant", "content": "Three."},
]


def write(path, talks):
  path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
  return path


def test_only_answers_count():
  assert templated(TALK[:3]) == (
    Part("<system>\nBe brief.\n", False),
    Part("<user>\nOne and one?\n", False),
    Part("<assistant>\n", False),
    Part("Two.", True),
  )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("chat")
  talks = [
    [
      {"role": "user", "content": f"What is {i} plus {j}?"},
      {"role": "assistant", "content": f"It is {i + j}, said Émile."},
    ]
    for i in range(20)
    for j in range(10)
  ]
  write(folder / "talks.jsonl", talks)
  config = DataConfig(sources=(f"chat:{folder / 'talks.jsonl'}",), vocab_size=350, seq_len=24)
  return open_data(config, folder / "cache")


def test_the_targets_of_a_batch_are_the_answers_and_the_end_token(data):
  tokenizer = data.tokenizer
  for batch in (next(data.train_loader(4)), next(data.eval_batches("validation", 4))):
    assert batch.tokens.min() >= 0 and batch.counted.shape == batch.tokens.shape
    for row, segments, counted in zip(batch.tokens, batch.segments, batch.counted, strict=True):
      for number in range(2, segments.max()):  # documents that are whole in this row
        here = segments == number
        assert tokenizer.decode(row[here & ~counted].tolist()).startswith("<user>\nWhat is")
        answer = row[here & counted]
        assert answer[-1] == tokenizer.eos_id
        assert tokenizer.decode(answer.tolist()).startswith("It is") and "Émile." in tokenizer.decode(answer.tolist())
    np.testing.assert_array_equal(batch.targets_BL[:, :] & ~batch.counted[:, 1:], False)
    assert 0.2 < batch.targets_BL.mean() < 0.8


def test_a_prompt_and_its_answer_are_tokenised_apart(data):
  document = open_source(data.config.sources[0])[0]
  ids, counted = ids_and_counted(ids_of(document, data.tokenizer))
  prompt = [data.tokenizer.bos_id, *data.tokenizer.encode("<user>\nWhat is 0 plus 0?\n").tolist()]
  assert ids[: len(prompt)].tolist() == prompt and not counted[: len(prompt)].any()
  assert [p.dtype for p in next(data.train_token_pairs())] == [np.int32, np.int32]
  assert min(p.min() for p in next(data.train_token_pairs())) >= 0


def test_text_alone_has_no_field_more(tmp_path):
  (tmp_path / "a.txt").write_text("some words, and some more of them\n" * 40)
  (tmp_path / "b.txt").write_text("other words, and fewer of these\n" * 40)
  for index in range(30):
    (tmp_path / f"{index}.txt").write_text(f"words {index} in a row\n" * 20)
  data = open_data(DataConfig(sources=(f"text:{tmp_path}",), vocab_size=300, seq_len=16), tmp_path / "cache")
  assert next(data.train_loader(2)).counted is None and next(data.eval_batches("train", 2)).counted is None


@pytest.mark.parametrize(
  ("line", "fault"),
  [
    ("{", "is not JSON"),
    ("[]", "is not an object"),
    ('{"text": "a"}', 'no list of "messages"'),
    ('{"messages": []}', 'no list of "messages"'),
    ('{"messages": [{"role": "user"}]}', 'message 1 has no string "content"'),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1 has the role 'bot', not one of system, user"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogate"),
  ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line, fault):
  path = write(tmp_path / "talks.jsonl", [TALK])
  path.write_text(path.read_text() + line + "\n")
  with pytest.raises(ConfigError, match="data.sources") as error:
    open_source(f"chat:{path}")
  assert fault in str(error.value) and "line 2" in str(error.value) and "\n" not in str(error.value)
