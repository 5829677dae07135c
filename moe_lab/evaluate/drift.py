"""How far apart two models route the same text: what quantising or fine-tuning did to the choice of experts."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.schema import Config
from moe_lab.nn.transformer import Transformer
from moe_lab.routing.base import Choice, RouterState
from moe_lab.sharding.head import spread_head_loss
from moe_lab.types import Batch


class Routed(NamedTuple):
  """A model to compare: parameters of whatever form, and its routing's state."""

  params: Any
  router_state: RouterState


class _Sums(NamedTuple):
  """Over the real tokens of a batch; [Z] over layers."""

  loss: jax.Array  # [2], before and after, in nats
  targets: jax.Array
  tokens: jax.Array
  flipped_Z: jax.Array  # tokens whose set of experts is another
  flipped_anywhere: jax.Array  # tokens that are among them in any layer
  jaccard_Z: jax.Array
  kl_Z: jax.Array
  count_2Z: jax.Array


def taken(choice: Choice) -> jax.Array:
  """Returns bool [..., E]: which experts a token takes."""
  one_hot = jax.nn.one_hot(choice.expert_TK, choice.logits_TE.shape[-1], dtype=bool)
  return (one_hot & choice.valid_TK[..., None]).any(-2)


def divergence(before: Choice, after: Choice) -> jax.Array:
  """Returns [...]: KL(before || after) of the routers' softmax over all experts, in nats."""
  log_p, log_q = (jax.nn.log_softmax(choice.logits_TE, axis=-1) for choice in (before, after))
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def overlap(before: jax.Array, after: jax.Array) -> jax.Array:
  """Returns [...]: the Jaccard index of two sets, bool [..., E]; two empty ones are the same."""
  either = (before | after).sum(-1)
  return jnp.where(either == 0, 1.0, (before & after).sum(-1) / jnp.maximum(either, 1))


def routing_drift(
  config: Config, before: Routed, after: Routed, batches: Iterable[Batch], budget: float | None = None
) -> dict:
  """Compares two models on the same batches, both by the rule of inference.

  Args:
    config: of both.
    before: the measure.
    after: what became of it.
    batches: held out.
    budget: mean experts asked for; None: the trained budget.

  Returns:
    loss_before, loss_after (nats per token), loss_rise (relative); flips (share of tokens whose set of experts, and so
    perhaps their number, is another; mean over layers), flips_anywhere (in any layer), jaccard (of the two sets),
    router_kl (nats), experts_before, experts_after, count_drift (of the mean number, relative), each of them a mean
    over layers, and flips_by_layer, jaccard_by_layer, router_kl_by_layer; tokens.
  """
  compare = functools.partial(_compare(config), *jax.device_put((before, after)))
  budget = config.routing.mean_count if budget is None else budget
  total = None
  for batch in batches:
    sums = jax.tree.map(np.asarray, compare(batch, budget))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  if total is None:
    raise ValueError("no batch to compare on")
  tokens = float(total.tokens)
  loss_before, loss_after = (total.loss / total.targets).tolist()
  experts_before, experts_after = (total.count_2Z.mean(1) / tokens).tolist()
  by_layer = {
    "flips": total.flipped_Z / tokens,
    "jaccard": total.jaccard_Z / tokens,
    "router_kl": total.kl_Z / tokens,
  }
  return {
    "loss_before": loss_before,
    "loss_after": loss_after,
    "loss_rise": loss_after / loss_before - 1,
    **{name: float(values.mean()) for name, values in by_layer.items()},
    "flips_anywhere": float(total.flipped_anywhere) / tokens,
    "experts_before": experts_before,
    "experts_after": experts_after,
    "count_drift": experts_after / experts_before - 1 if experts_before else 0.0,
    **{f"{name}_by_layer": values.tolist() for name, values in by_layer.items()},
    "tokens": int(tokens),
  }


@functools.cache
def _compare(config: Config):
  """Returns compare(before, after, batch, budget) -> _Sums, jitted; one for all data."""
  model = Transformer(config, traced=True)

  @jax.jit
  def compare(before: Routed, after: Routed, batch: Batch, budget) -> _Sums:
    token_BL, segment_BL = batch.tokens[:, :-1], batch.segments[:, :-1]
    weight_BL = batch.targets_BL.astype(jnp.float32)
    budget_B = jnp.full(token_BL.shape[0], budget, jnp.float32)
    choices, losses = [], []
    for routed in (before, after):
      out = model.apply({"params": routed.params}, token_BL, segment_BL, budget_B, routed.router_state)
      loss, _ = spread_head_loss(out.hidden_BLD, out.head_VD, batch.tokens[:, 1:], weight_BL, None)
      choices.append(out.stats.choice)
      losses.append(loss)
    mask_T = (segment_BL != 0).reshape(-1).astype(jnp.float32)
    first_ZTE, second_ZTE = (taken(choice) for choice in choices)
    flipped_ZT = (first_ZTE != second_ZTE).any(-1)
    return _Sums(
      loss=jnp.stack(losses),
      targets=weight_BL.sum(),
      tokens=mask_T.sum(),
      flipped_Z=flipped_ZT @ mask_T,
      flipped_anywhere=flipped_ZT.any(0) @ mask_T,
      jaccard_Z=overlap(first_ZTE, second_ZTE) @ mask_T,
      kl_Z=divergence(*choices) @ mask_T,
      count_2Z=jnp.stack([first_ZTE.sum(-1) @ mask_T, second_ZTE.sum(-1) @ mask_T]),
    )

  return compare
