"""Loss and experts on held-out data: dropless, greedy counts, nothing sampled."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import Decisions, RouterState
from moe_lab.sharding.head import spread_head_loss
from moe_lab.sharding.rules import copied
from moe_lab.types import Batch


class TokenResults(NamedTuple):
  """One batch, token by token.

  Attributes:
    nll_BL: float32, nats.
    weight_BL: float32, 1 where the prediction counts.
    count_ZBL: int32, experts of each token in each mixture-of-experts layer.
    assigned_ZE: float32, rows by expert.
  """

  nll_BL: jax.Array
  weight_BL: jax.Array
  count_ZBL: jax.Array
  assigned_ZE: jax.Array


EvalStep = Callable[..., TokenResults]


def make_eval_step(config: Config, model: Transformer) -> EvalStep:
  """Returns eval_step(params, router_state, batch, budget, decisions=Decisions()) -> TokenResults, jitted."""

  @jax.jit
  def eval_step(params, router_state: RouterState, batch: Batch, budget, decisions: Decisions = Decisions()):
    token_BL, segment_BL = batch.tokens[:, :-1], batch.segments[:, :-1]
    weight_BL = batch.targets_BL.astype(jnp.float32)
    budget_B = jnp.full(token_BL.shape[0], budget, jnp.float32)
    out = model.apply({"params": params}, token_BL, segment_BL, budget_B, router_state, decisions=decisions)
    count_ZBL = out.stats.count_T.reshape(-1, *token_BL.shape)
    _, nll_BL = spread_head_loss(out.hidden_BLD, out.head_VD, batch.tokens[:, 1:], weight_BL, model.mesh)
    return copied(TokenResults(nll_BL, weight_BL, count_ZBL, out.stats.assigned_E), model.mesh)

  return eval_step


def evaluate(
  eval_step: EvalStep,
  params,
  router_state: RouterState,
  batches: Iterable[Batch],
  budget: float,
  *,
  class_names: tuple[str, ...],
  slots: int,
  bytes_per_token: np.ndarray | None = None,
  decide: Callable[[Batch], Decisions] | None = None,
) -> dict:
  """Sums a pass over `batches`.

  Args:
    eval_step: of `make_eval_step`.
    params: the model's.
    router_state: with the greedy rule's calibration.
    batches: of one split.
    budget: mean experts asked for.
    class_names: of the batches' classes.
    slots: K.
    bytes_per_token: int [V], to give bits per byte.
    decide: gives choices to replay instead of the router's own (controls).

  Returns:
    loss (nats per token), bits_per_byte, tokens, mean_experts, mean_experts_by_layer,
    k_histogram [Z][K + 1] (share of tokens), load [Z][E] (share of rows), and
    by_class: {name: tokens, loss, mean_experts}, by the class of the *predicted* token.
  """
  loss_C, tokens_C, experts_C = (np.zeros(len(class_names)) for _ in range(3))
  histogram_ZK1, assigned_ZE, num_bytes = 0.0, 0.0, 0
  for batch in batches:
    decisions = decide(batch) if decide else Decisions()
    result = jax.tree.map(np.asarray, eval_step(params, router_state, batch, budget, decisions))
    weight = result.weight_BL > 0
    classes, targets = batch.classes[:, 1:][weight], batch.tokens[:, 1:][weight]
    mean_count_BL = result.count_ZBL.mean(0)
    for total, values in ((loss_C, result.nll_BL[weight]), (tokens_C, None), (experts_C, mean_count_BL[weight])):
      total += np.bincount(classes, values, minlength=len(class_names))
    real_BL = batch.segments[:, :-1] != 0
    histogram_ZK1 = histogram_ZK1 + np.stack([np.bincount(c[real_BL], minlength=slots + 1) for c in result.count_ZBL])
    assigned_ZE = assigned_ZE + result.assigned_ZE
    num_bytes += int(bytes_per_token[targets].sum()) if bytes_per_token is not None else 0

  if tokens_C.sum() == 0:
    raise ValueError("no batch to evaluate")
  histogram_ZK1 = histogram_ZK1 / histogram_ZK1.sum(-1, keepdims=True)
  mean_Z = histogram_ZK1 @ np.arange(slots + 1)
  return {
    "loss": loss_C.sum() / tokens_C.sum(),
    "bits_per_byte": loss_C.sum() / np.log(2) / num_bytes if num_bytes else None,
    "tokens": int(tokens_C.sum()),
    "mean_experts": mean_Z.mean(),
    "mean_experts_by_layer": mean_Z.tolist(),
    "k_histogram": histogram_ZK1.tolist(),
    "load": (assigned_ZE / np.maximum(assigned_ZE.sum(-1, keepdims=True), 1)).tolist(),
    "by_class": {
      name: {"tokens": int(n), "loss": loss / n, "mean_experts": experts / n}
      for name, n, loss, experts in zip(class_names, tokens_C, loss_C, experts_C, strict=True)
      if n
    },
  }
