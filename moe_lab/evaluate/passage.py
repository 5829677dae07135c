"""A passage of held-out text with the experts that each token got."""

import numpy as np

from moe_lab.data.loader import Data
from moe_lab.evaluate.perplexity import EvalStep

TOKENS = 400  # about a screenful


def passage(
  eval_step: EvalStep, params, router_state, data: Data, split: str, batch_size: int, budget: float
) -> list[dict]:
  """Returns the tokens of the split's first row or rows: text, experts (mean and by layer), loss in nats.

  Counts are those spent on the token as input; the loss is that of the token as
  target, None where nothing predicted it.
  """
  batch = next(iter(data.eval_batches(split, batch_size, 1)))
  result = eval_step(params, router_state, batch, budget)
  count_ZBL, nll_BL, weight_BL = np.asarray(result.count_ZBL), np.asarray(result.nll_BL), np.asarray(result.weight_BL)
  texts = data.tokenizer.piece_texts() if data.tokenizer else [f"{i} " for i in range(data.vocab_size)]
  tokens = []
  for row in range(batch.tokens.shape[0]):
    for column in range(batch.tokens.shape[1] - 1):
      if batch.segments[row, column] == 0 or len(tokens) == TOKENS:
        return tokens
      counts = count_ZBL[:, row, column]
      predicted = column > 0 and weight_BL[row, column - 1] > 0
      tokens.append(
        {
          "text": texts[batch.tokens[row, column]],
          "experts": float(counts.mean()),
          "experts_by_layer": counts.tolist(),
          "loss": float(nll_BL[row, column - 1]) if predicted else None,
        }
      )
  return tokens
