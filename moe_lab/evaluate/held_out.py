"""The full evaluation of a model on a dataset: what evaluate.py and the end of training report."""

from collections.abc import Callable

from moe_lab.config.schema import Config
from moe_lab.data.loader import Data
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.evaluate.passage import passage
from moe_lab.evaluate.perplexity import EvalStep, evaluate
from moe_lab.io.progress import told
from moe_lab.routing.base import RouterState
from moe_lab.routing.registry import make_router

SHORT = {"train": "train", "validation": "val", "test": "test"}  # of a split's name, in the keys of a report


def held_out_report(
  config: Config,
  data: Data,
  eval_step: EvalStep,
  params,
  router_state: RouterState,
  note: Callable[[str], None],
  *,
  budget: float | None = None,
  splits: tuple[str, ...] = ("validation", "test"),
) -> dict:
  """Evaluates whole splits, and notes now and then how far it is.

  Returns:
    The record of evaluation.json: val_loss, test_loss and their bits per byte;
    all else (mean_experts, by_class, k_histogram, load, passage,
    flops_per_token, causal) is of the last split named, which is given as "split".
  """
  if budget is None:
    budget = config.routing.mean_count
  report, batch_size = {}, config.train.batch_size
  for split in splits:
    result = evaluate(
      eval_step,
      params,
      router_state,
      told(data.eval_batches(split, batch_size), f"batches of the {split} split evaluated", note),
      budget,
      class_names=data.class_names,
      slots=config.routing.slots,
      bytes_per_token=data.tokenizer.bytes_per_token() if data.tokenizer else None,
    )
    report[f"{SHORT[split]}_loss"] = result.pop("loss")
    report[f"{SHORT[split]}_bits_per_byte"] = result["bits_per_byte"]
    report[f"{SHORT[split]}_mean_experts"] = result["mean_experts"]
    report |= result | {"split": split}
  # Documents are shorter than rows as often as not; half a row is the fair guess, and exact for a full one.
  report["flops_per_token"] = forward_flops_per_token(config, report["mean_experts"], config.data.seq_len / 2)["total"]
  report["budget"] = budget
  # A choice of experts that sees later tokens has seen the targets: its loss is not to be compared with the others'.
  report["causal"] = make_router(config.routing).causal
  report["passage"] = passage(eval_step, params, router_state, data, splits[-1], batch_size, budget)
  return report
