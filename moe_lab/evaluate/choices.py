"""Multiple choice built from held-out text: which of four endings is the text's own?

In the manner of HellaSwag (arXiv 1905.07830), with endings of other texts instead of generated ones: an item is the
first half of a row, its own next tokens, and those of three other rows at the same place. The ending of the least loss
is the answer; by chance a quarter are right.
"""

from collections.abc import Iterable

import numpy as np

from moe_lab.evaluate.drift import Routed
from moe_lab.evaluate.perplexity import EvalStep
from moe_lab.types import Batch

ENDINGS = 4
TOKENS = 12  # of an ending


def items(batch: Batch, tokens: int = TOKENS) -> tuple[Batch, np.ndarray] | None:
  """Returns rows to score, and the tokens that are endings; None if too few rows of a batch will do.

  A row will do if its ending and what is before it, as much again, are of one document.

  Args:
    batch: held out, [B, L + 1].
    tokens: of an ending.

  Returns:
    A batch [ENDINGS * I, L + 1] of I items, in blocks: the first block has every item's own ending. And bool
    [ENDINGS * I, L], which predictions are of an ending.
  """
  rows, width = batch.tokens.shape
  begin = width // 2
  near_BT = np.asarray(batch.segments)[:, begin - tokens : begin + tokens]
  fit = np.flatnonzero((near_BT == near_BT[:, :1]).all(1) & (near_BT[:, 0] != 0))
  if len(fit) < ENDINGS:
    return None
  token_IL, blocks = np.asarray(batch.tokens)[fit], []
  for shift in range(ENDINGS):
    block = token_IL.copy()
    block[:, begin : begin + tokens] = np.roll(token_IL, shift, axis=0)[:, begin : begin + tokens]
    blocks.append(block)
  segments = np.tile(np.asarray(batch.segments)[fit], (ENDINGS, 1))
  scored = np.zeros((len(fit) * ENDINGS, width - 1), bool)
  scored[:, begin - 1 : begin + tokens - 1] = True
  return Batch(np.concatenate(blocks), segments, np.zeros_like(segments)), scored


def choices(eval_step: EvalStep, model: Routed, batches: Iterable[Batch], budget: float, most: int) -> dict:
  """Returns right, asked and accuracy (a share) of at most `most` items.

  Args:
    eval_step: of the model's configuration.
    model: to ask.
    batches: held out; each is scored as one of ENDINGS times as many rows.
    budget: mean experts asked for.
    most: items.
  """
  right, asked = 0, 0
  for batch in batches:
    found = items(batch)
    if found is None:
      continue
    made, scored = found
    number = len(scored) // ENDINGS
    # One shape for all batches: filled up with rows of padding.
    fill = ENDINGS * len(batch.tokens) - len(scored)
    made = Batch(*(np.pad(rows, ((0, fill), (0, 0))) for rows in made[:3]))
    nll_BL = np.asarray(eval_step(model.params, model.router_state, made, budget).nll_BL)[: len(scored)]
    loss_AI = np.where(scored, nll_BL, 0.0).sum(1).reshape(ENDINGS, number)
    taken = min(number, most - asked)
    right += int((loss_AI.argmin(0) == 0)[:taken].sum())
    asked += taken
    if asked == most:
      break
  return {"right": right, "asked": asked, "accuracy": right / max(asked, 1)}
