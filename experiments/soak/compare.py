"""Where two runs of one configuration differ: in what they recorded step by step, and in what they ended with."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.run import load_run
from moe_lab.train.state import abstract_state

_CLOCKS = {"time", "tokens_per_second"}  # of a record, all else must be alike


def different_records(records: Iterable[dict], calm: Sequence[dict]) -> list[str]:
  """Returns in words where records are not what the calm run has of the same kind and step, ordered by step."""
  wanted = {(record["kind"], record["step"]): record for record in calm}
  found = []
  for record in sorted(records, key=lambda record: record["step"]):
    kind, step = record["kind"], record["step"]
    other = wanted.get((kind, step))
    if other is None:
      found.append(f"step {step}: a record of kind {kind!r}, and the calm run has none")
      continue
    for field in dict.fromkeys([*record, *other]):
      if field not in _CLOCKS and record.get(field) != other.get(field):
        found.append(f"step {step}: {kind} {field} is {record.get(field)}, and {other.get(field)} in the calm run")
  return found


def different_steps(final: Sequence[dict], calm: Sequence[dict]) -> list[str]:
  """Returns in words where the records that a run has in the end are not of the calm run's steps, each once."""
  ours, theirs = ([(r["step"], r["kind"]) for r in records] for records in (final, calm))
  for (step, kind), (other_step, other_kind) in zip(ours, theirs, strict=False):
    if (step, kind) != (other_step, other_kind):
      return [f"step {step}: {kind!r} is recorded where the calm run has {other_kind!r} of step {other_step}"]
  return [] if len(ours) == len(theirs) else [f"{len(ours)} records, and {len(theirs)} of the calm run"]


def different_states(state: object, calm: object) -> list[str]:
  """Returns in words which arrays of two trees are not the same bit for bit."""
  ours, theirs = (dict(jax.tree_util.tree_flatten_with_path(tree)[0]) for tree in (state, calm))
  found = []
  for path in dict.fromkeys([*ours, *theirs]):
    one, other = (None if path not in tree else np.asarray(tree[path]) for tree in (ours, theirs))
    if one is None or other is None or one.dtype != other.dtype or one.tobytes() != other.tobytes():
      found.append(f"the end: {jax.tree_util.keystr(path)} is not the calm run's, bit for bit")
  return found


def different_ends(workdir: Path, calm: Path) -> list[str]:
  """Returns in words where the last checkpoints of two runs differ, in the state or in what goes with it."""
  (state, meta, step), (wanted, wanted_meta, wanted_step) = _last_state(workdir), _last_state(calm)
  if step != wanted_step:
    return [f"the end: step {step}, and {wanted_step} of the calm run"]
  found = different_states(state, wanted)
  return found + [f"the end: {name} is not the calm run's" for name in wanted_meta if meta[name] != wanted_meta[name]]


def _last_state(workdir: Path) -> tuple[object, dict, int]:
  with Checkpointer(workdir, keep=None) as checkpointer:
    return checkpointer.restore(abstract_state(load_run(workdir)[0]))
