"""What fewer experts cost a model that was trained with k: by a policy, and by the controls that have its compute."""

import functools
from collections.abc import Callable, Iterable, Sequence

from moe_lab.config.schema import Config
from moe_lab.evaluate.controls import fixed_count, mean_count, shuffled_counts
from moe_lab.evaluate.drift import Routed
from moe_lab.evaluate.perplexity import evaluate, make_eval_step
from moe_lab.nn.transformer import Transformer
from moe_lab.types import Batch


def _evaluated(config: Config, model: Routed, batches: Iterable[Batch], class_names, budget, decide=None) -> dict:
  """Returns loss and experts of a pass."""
  result = evaluate(
    _eval_step(config), *model, batches, budget, class_names=class_names, slots=config.routing.slots, decide=decide
  )
  return {"experts": result["mean_experts"], "loss": result["loss"]}


@functools.lru_cache(maxsize=4)
def _eval_step(config: Config):
  return make_eval_step(config, Transformer(config))


def loss_of(config: Config, model: Routed, batches: Iterable[Batch], class_names: tuple[str, ...]) -> float:
  """Returns the loss at the trained budget, nats per token."""
  return _evaluated(config, model, batches, class_names, config.routing.mean_count)["loss"]


def fewer_experts(
  before: tuple[Config, Routed],
  after: tuple[Config, Routed],
  batches: Callable[[], Iterable[Batch]],
  class_names: tuple[str, ...],
  budgets: Sequence[float],
  seed: int = 0,
) -> dict:
  """Compares a policy on a frozen model with that model, and with counts that know nothing of the token.

  Args:
    before: configuration and model of fixed k.
    after: those with the policy.
    batches: begins a pass over held-out data.
    class_names: of the batches' classes.
    budgets: that the policy is asked for.
    seed: of what the controls draw.

  Returns:
    full (experts, loss); and with saved (share of k) and rise (of the loss, relative to full) in each, policy by budget
    and, with its measured experts, random (its counts dealt out anew within each layer) and alike (every token its
    mean, drawn between the whole numbers around it); fixed, of each count below k.
  """
  config, model = after
  layers = config.model.routed_layers
  full = _evaluated(*before, batches(), class_names, before[0].routing.mean_count)

  def measured(budget, decide=None):
    one = _evaluated(config, model, batches(), class_names, budget, decide)
    return one | {"saved": 1 - one["experts"] / full["experts"], "rise": one["loss"] / full["loss"] - 1}

  found = {"full": full, "policy": [], "random": [], "alike": []}
  for budget in budgets:
    found["policy"].append({"budget": budget} | measured(budget))
    shuffle = shuffled_counts(_eval_step(config), *model, budget, seed)
    found["random"].append({"budget": budget} | measured(budget, shuffle))
    alike = mean_count(layers, found["policy"][-1]["experts"], seed)
    found["alike"].append({"budget": budget} | measured(budget, alike))
  found["fixed"] = [measured(budgets[0], fixed_count(layers, k)) for k in range(1, config.routing.k_max)]
  return found
