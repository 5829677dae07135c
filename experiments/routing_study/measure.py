"""What the study measures of one trained run: its own routing on a held-out split, and controls of the same compute.

The numbers are kept in the run's folder, study-SPLIT.json, by rule: a rule that
is there already, of the same checkpoint, is not measured again.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from moe_lab.config.schema import Config, DataConfig
from moe_lab.data.loader import Data, open_data
from moe_lab.errors import UserError, did_you_mean
from moe_lab.evaluate import controls
from moe_lab.evaluate.alarms import alarms, dead_experts, max_over_mean_load
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.evaluate.perplexity import EvalStep, evaluate, make_eval_step
from moe_lab.evaluate.removal import loss_rises
from moe_lab.io.files import dump_json, write_text
from moe_lab.io.writers import read_metrics
from moe_lab.train.load import LoadedModel, load_model
from moe_lab.types import Batch

OWN = "own"  # the rule by which a model decides itself
REMOVAL = "removal"
REMOVAL_BATCHES = 8  # of the split; the loss without an expert is paired with that of the same batches


class Subject(NamedTuple):
  """A trained model and what it is measured with."""

  loaded: LoadedModel
  data: Data
  eval_step: EvalStep
  split: str

  @property
  def num_moe_layers(self) -> int:
    return self.loaded.config.model.num_layers - self.loaded.config.model.num_dense_layers

  def reference(self) -> Iterator[Batch]:
    """Yields what a control may learn mean counts from: the other held-out split."""
    other = "test" if self.split == "validation" else "validation"
    return self.data.eval_batches(other, self.loaded.config.train.batch_size)


# By the name that a sweep's note "controls" uses; each gives the `decide` of `perplexity.evaluate`.
CONTROLS: dict[str, Callable[[Subject], Callable]] = {
  "shuffled": lambda s: controls.shuffled_counts(
    s.eval_step, s.loaded.params, s.loaded.router_state, s.loaded.budget, seed=0
  ),
  "by_layer": lambda s: controls.counts_by_layer(
    s.eval_step, s.loaded.params, s.loaded.router_state, s.loaded.budget, s.reference(), seed=0
  ),
  "by_token": lambda s: controls.counts_by_token(
    s.eval_step,
    s.loaded.params,
    s.loaded.router_state,
    s.loaded.budget,
    s.reference(),
    s.loaded.config.data.vocab_size,
    seed=0,
  ),
  "fixed": lambda s: controls.fixed_count(s.num_moe_layers, round(s.loaded.budget)),
  "oracle": lambda s: controls.oracle_counts(
    s.eval_step,
    s.loaded.params,
    s.loaded.router_state,
    s.loaded.budget,
    counts=sorted({s.loaded.config.routing.k_min, 2, 4, s.loaded.config.routing.k_max}),
  ),
}
BOUNDS = ("oracle",)  # of these, such that have seen the targets: no router can do what they do


def rules_of(notes: dict[str, str]) -> list[str]:
  """Returns the names of what is measured of a run with these notes.

  Raises:
    UserError: a control that there is not.
  """
  rules = [OWN]
  for name in _listed(notes.get("controls")):
    if name not in CONTROLS:
      wanted = f"wanted some of {', '.join(CONTROLS)}{did_you_mean(name, CONTROLS)}"
      raise UserError(f"controls={name!r} in the sweep: {wanted}")
    rules.append(name)
  rules += [f"budget {float(budget):g}" for budget in _listed(notes.get("budgets"))]
  return rules + ([REMOVAL] if "removal" in notes else [])


def measure(workdir: Path, split: str, notes: dict[str, str], cache_dir: Path, stop: Callable[[], None]) -> dict:
  """Measures a trained run.

  Args:
    workdir: of the run.
    split: "validation" or "test".
    notes: of the run in its sweep: what to measure (`rules_of`), and whether its count is fixed ("role").
    cache_dir: for tokenizers.
    stop: called between rules; raises to leave.

  Returns:
    "step", "parameters" (total), "training" (see `training_cost`), "alarms", dead_experts and max_over_mean_load by
    layer, and "rules": by name, what `perplexity.evaluate` gives, with flops_per_token at the measured mean experts.
  """
  path = workdir / f"study-{split}.json"
  rules = rules_of(notes)
  loaded = load_model(workdir)
  record = _read(path)
  if record.get("step") != loaded.step:
    record = {"step": loaded.step, "split": split, "rules": {}}
  missing = [rule for rule in rules if rule not in record["rules"]]
  if missing:
    data = _data(dataclasses.replace(loaded.config.data, seed=0), cache_dir)
    loaded.check_fingerprint(data.fingerprint)
    subject = Subject(loaded, data, make_eval_step(loaded.config, loaded.model), split)
    for rule in missing:
      stop()
      record["rules"][rule] = _removal(subject) if rule == REMOVAL else _rule(subject, rule)
      write_text(path, dump_json(record) + "\n")
  own = record["rules"][OWN]
  return record | {
    "rules": {rule: record["rules"][rule] for rule in rules},
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
    "training": training_cost(read_metrics(workdir)),
    "alarms": alarms(own, loaded.budget, fixed_count=loaded.config.routing.fixed),
    "dead_experts": dead_experts(own["load"]),
    "max_over_mean_load": max_over_mean_load(own["load"]),
  }


def training_cost(records: list[dict]) -> dict:
  """Returns what training took: "tokens", "flops" (second rollouts counted), "seconds", and "learning_curve".

  Seconds are tokens over the median speed between two records, so that compiling, evaluating and a neighbour's burst on
  the machine are left out. The curve holds (tokens, flops, validation loss) of each evaluation on the way.
  """
  train = [record for record in records if record.get("kind") == "train"]
  speeds = [record["tokens_per_second"] for record in train if record.get("tokens_per_second")]
  curve = [(r["tokens"], r["flops"], r["val_loss"]) for r in records if r.get("kind") == "eval"]
  last = train[-1]
  seconds = last["tokens"] / statistics.median(speeds)
  return {"tokens": last["tokens"], "flops": last["flops"], "seconds": seconds, "learning_curve": curve}


def _rule(subject: Subject, rule: str) -> dict:
  loaded, config = subject.loaded, subject.loaded.config
  kind, _, asked = rule.partition(" ")
  budget = float(asked) if kind == "budget" else loaded.budget
  bytes_per_token = subject.data.tokenizer.bytes_per_token() if subject.data.tokenizer else None
  result = evaluate(
    subject.eval_step,
    loaded.params,
    loaded.router_state,
    subject.data.eval_batches(subject.split, config.train.batch_size),
    budget,
    class_names=subject.data.class_names,
    slots=config.routing.slots,
    bytes_per_token=bytes_per_token,
    decide=CONTROLS[rule](subject) if rule in CONTROLS else None,
  )
  return result | {"budget": budget, "flops_per_token": _flops(config, result["mean_experts"])}


def _removal(subject: Subject) -> dict:
  loaded = subject.loaded
  batch_size = loaded.config.train.batch_size
  batches = list(subject.data.eval_batches(subject.split, batch_size, REMOVAL_BATCHES))
  return loss_rises(subject.eval_step, loaded.params, loaded.router_state, batches, loaded.budget)


def _flops(config: Config, mean_experts: float) -> float:
  # Half a row is the context that a token sees on average, as in `held_out_report`.
  return forward_flops_per_token(config, mean_experts, config.data.seq_len / 2)["total"]


@functools.lru_cache(maxsize=2)
def _data(config: DataConfig, cache_dir: Path) -> Data:
  """Opens data for evaluation; held-out splits are the same for every seed, so runs of a corpus share them."""
  return open_data(config, cache_dir)


def _read(path: Path) -> dict:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (FileNotFoundError, ValueError):
    return {}  # not there, or spoilt: measured anew


def _listed(text: str | None) -> list[str]:
  return [item.strip() for item in (text or "").split(",") if item.strip()]
