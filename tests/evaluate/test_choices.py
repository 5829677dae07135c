"""Multiple choice from held-out rows: items that are what they say, and a judge that knows the answers."""

import numpy as np

from moe_lab.evaluate.choices import ENDINGS, choices, items
from moe_lab.evaluate.drift import Routed
from moe_lab.evaluate.perplexity import TokenResults
from moe_lab.types import Batch


def batch(rows=6, length=40):
  tokens = np.arange(rows)[:, None] * 100 + np.arange(length + 1)
  return Batch(tokens.astype(np.int32), np.ones_like(tokens, np.int32), np.zeros_like(tokens, np.int32))


def test_endings_are_of_other_rows_at_the_same_place():
  one = batch()
  one.segments[2, 15:] = 2  # a document begins within reach: no item
  one.segments[3, 10:] = 0  # padding
  made, scored = items(one, tokens=8)
  number = len(scored) // ENDINGS
  assert number == 4
  own = one.tokens[[0, 1, 4, 5]]
  np.testing.assert_array_equal(made.tokens[:number], own)
  for shift in range(1, ENDINGS):
    block = made.tokens[shift * number : (shift + 1) * number]
    np.testing.assert_array_equal(block[:, 20:28], np.roll(own, shift, 0)[:, 20:28])
    np.testing.assert_array_equal(np.delete(block, range(20, 28), 1), np.delete(own, range(20, 28), 1))
  assert scored.sum(1).tolist() == [8] * 16 and scored[0, 19:27].all()  # predictions of tokens 20 to 27


def test_too_few_rows_make_no_item():
  one = batch(rows=3)
  assert items(one) is None


def test_the_least_loss_is_the_answer():
  def knows(params, router_state, made, budget):
    # A row's tokens go on by one: an ending of another row does not.
    jump = np.abs(np.diff(made.tokens, axis=1) - 1).astype(np.float32)
    return TokenResults(jump, np.ones_like(jump), None, None)

  def knows_nothing(params, router_state, made, budget):
    return TokenResults(
      np.ones(made.tokens[:, 1:].shape, np.float32) * -np.arange(len(made.tokens))[:, None], None, None, None
    )

  model, batches = Routed(None, None), [batch(rows=8), batch(rows=3), batch(rows=8)]
  assert choices(knows, model, batches, 2.0, most=100) == {"right": 16, "asked": 16, "accuracy": 1.0}
  assert choices(knows, model, batches, 2.0, most=10)["asked"] == 10
  assert choices(knows_nothing, model, batches, 2.0, most=100)["right"] == 0
