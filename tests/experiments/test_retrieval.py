"""The retrieval study: answers are counted right, and put together by arm, way and length."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments.retrieval import answers, page, study
from moe_lab.config.load import load
from moe_lab.config.resolve import resolve
from moe_lab.data import retrieval
from moe_lab.data.loader import open_data
from moe_lab.nn.attention import layer_windows

TRAINED, INTERPOLATED, SHARP = answers.WAYS
CONFIG = resolve(load(f"{study.CONFIG}:modified"))


class Copies:
  """Says what followed the current token when it stood in the row for the first time; never sees a row's last token."""

  def __init__(self, config):
    pass

  def apply(self, _, token_BL, *rest):
    first_BL = (token_BL[:, :, None] == token_BL[:, None, :]).argmax(-1)
    after_BL = jnp.take_along_axis(token_BL, jnp.minimum(first_BL + 1, token_BL.shape[1] - 1), axis=1)
    return SimpleNamespace(
      hidden_BLD=jax.nn.one_hot(after_BL, retrieval.VOCAB_SIZE), head_VD=jnp.eye(retrieval.VOCAB_SIZE)
    )


def test_right_answers_are_counted(monkeypatch, tmp_path):
  monkeypatch.setattr(answers, "Transformer", Copies)
  loaded = SimpleNamespace(config=CONFIG, params={}, router_state=None, budget=2.0)
  found = answers.answered(loaded, tmp_path, 256, 12, "as trained", "validation")
  assert found["multikey"]["right"] == found["multikey"]["asked"] > 0
  # The same rule says a passkey only where no digit stands in it twice.
  sure = 0
  data = open_data(CONFIG.data.__class__(**vars(CONFIG.data) | {"seq_len": 256}), tmp_path)
  for batch in data.eval_batches("validation", 1, 12):
    digits = batch.tokens[0][batch.classes[0] == data.class_names.index("passkey")]
    sure += len(digits) == retrieval.PLACES and len(set(digits.tolist()[:-1])) == retrieval.PLACES - 1
  assert 0 < sure <= found["passkey"]["right"] <= found["passkey"]["asked"]
  assert found["passkey"]["asked"] * retrieval.PAIRS + found["multikey"]["asked"] == 12 * retrieval.PAIRS


def test_the_summary_by_hand():
  def asked(length, way, passkeys, pairs):
    kinds = {"passkey": {"right": passkeys, "asked": 4}, "multikey": {"right": pairs, "asked": 8}}
    return {"length": length, "way": way} | kinds

  runs = [
    {
      "arm": "modified",
      "seed": 0,
      "asked": [
        asked(1024, TRAINED, 4, 8),
        asked(1024, SHARP, 4, 4),
        asked(2048, TRAINED, 2, 8),
        asked(2048, INTERPOLATED, 0, 4),
        asked(2048, SHARP, 1, 4),
      ],
    },
    {
      "arm": "modified",
      "seed": 1,
      "asked": [
        asked(1024, TRAINED, 2, 8),
        asked(1024, SHARP, 4, 8),
        asked(2048, TRAINED, 0, 4),
        asked(2048, INTERPOLATED, 0, 4),
        asked(2048, SHARP, 1, 0),
      ],
    },
  ]
  found = {(e["way"], e["length"]): (e["passkey"], e["multikey"]) for e in study._summary(runs)}
  assert found == {
    (TRAINED, 1024): (0.75, 1.0), (INTERPOLATED, 1024): (0.75, 1.0), (SHARP, 1024): (1.0, 0.75),
    (TRAINED, 2048): (0.25, 0.75), (INTERPOLATED, 2048): (0.0, 0.5), (SHARP, 2048): (0.25, 0.25),
  }  # fmt: skip
  assert page.page_of(study._summary(runs), "a command").count("<figure") == 6
  assert "75% (100 50)" in page.table(study._summary(runs))


@pytest.mark.parametrize(("arm", "windowed"), [("modified", 7), ("plain", 8), ("rotary", 0)])
def test_the_arms(arm, windowed):
  model = resolve(load(f"{study.CONFIG}:{arm}")).model
  assert sum(window is not None for window in layer_windows(model)) == windowed
  assert (model.head_dim, model.num_kv_heads, model.qk_bound) == (128, 8, 8.0)


def test_longer_rows_are_read_in_three_ways():
  trained, interpolated, sharpened = (answers.longer(CONFIG.model, way, 1024, 4096) for way in answers.WAYS)
  assert trained == CONFIG.model
  assert (interpolated.position_interpolation, interpolated.sharpen_from) == (4.0, 0)
  assert (sharpened.position_interpolation, sharpened.sharpen_from) == (1.0, 256)
  # Where every group has a slope there is nothing to sharpen; where none has, all.
  for arm, start in (("plain", 0), ("rotary", 256)):
    model = resolve(load(f"{study.CONFIG}:{arm}")).model
    assert answers.longer(model, SHARP, 1024, 4096).sharpen_from == start
