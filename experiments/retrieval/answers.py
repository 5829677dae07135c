"""How many questions a model answers, at rows longer than it was trained on."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from moe_lab.config.schema import ModelConfig
from moe_lab.data.loader import open_data
from moe_lab.data.retrieval import PAIRS, PLACES
from moe_lab.nn.transformer import Transformer, head
from moe_lab.train.load import LoadedModel

END = 3 * PAIRS  # tokens at a held-out row's end that hold all questions and answers: a mark, a key and its value each


WAYS = ("as trained", "interpolated", "sharpened")  # in which a model reads rows longer than it was trained on
SHARPER = 4  # logits grow from so many times less than the trained length on; tuned on validation (LOG.md)


def longer(model: ModelConfig, way: str, trained_length: int, length: int) -> ModelConfig:
  """Returns the model's shapes for rows of `length` tokens, read in one of WAYS."""
  all_sloped = model.position == "alibi" and model.num_global_groups == 0  # no logits to sharpen
  changes = {
    "as trained": {},
    "interpolated": {"position_interpolation": length / trained_length},
    "sharpened": {} if all_sloped else {"sharpen_from": trained_length // SHARPER},
  }
  return dataclasses.replace(model, **changes[way])


def answered(loaded: LoadedModel, cache_dir: Path, length: int, rows: int, way: str, split: str) -> dict:
  """Returns the share of right answers by kind of question; a passkey is right if all its digits are.

  Each token of an answer is the most likely one after the right ones before it, which for a whole right answer is the
  same as generating it.

  Args:
    loaded: a model trained on `synthetic:retrieval`.
    cache_dir: for `open_data`.
    length: tokens of a row.
    rows: how many of the split.
    way: one of WAYS.
    split: "validation" or "test".

  Returns:
    "passkey" and "multikey": {"right", "asked"}.
  """
  shapes = longer(loaded.config.model, way, loaded.config.data.seq_len, length)
  model = Transformer(dataclasses.replace(loaded.config, model=shapes))
  data = open_data(dataclasses.replace(loaded.config.data, seq_len=length), cache_dir)

  @jax.jit
  def guesses(params, router_state, token_BL, segment_BL):
    budget_B = jax.numpy.full(token_BL.shape[0], loaded.budget, jax.numpy.float32)
    out = model.apply({"params": params}, token_BL, segment_BL, budget_B, router_state)
    return head(out.hidden_BLD[:, -END:], out.head_VD).argmax(-1)

  right_N, kind_N = [], []
  for batch in data.eval_batches(split, 1, rows):
    inputs = batch.tokens[:, :-1], batch.segments[:, :-1]
    guess_N = np.asarray(guesses(loaded.params, loaded.router_state, *inputs))[0]
    right_N.append(guess_N == batch.tokens[0, -END:])
    kind_N.append(batch.classes[0, -END:])
  right, kind = np.concatenate(right_N), np.concatenate(kind_N)
  found = {}
  for name, tokens in (("passkey", PLACES), ("multikey", 1)):
    answers = right[kind == data.class_names.index(name)].reshape(-1, tokens).all(1)
    found[name] = {"right": int(answers.sum()), "asked": len(answers)}
  return found
