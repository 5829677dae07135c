"""Sweeps: many runs as a small algebra over dotted overrides of one base configuration.

A sweep file defines `get_sweep(arg=None)`:

    def get_sweep(arg=None):
      arms = axis("arm", {f"topk-{k}": {"routing.method": "topk", "routing.k": k} for k in (1, 2, 4)}, role="fixed")
      arms += axis("arm", {"dynamic-2": {"routing.method": "dynamic", "routing.budget": 2}}, role="ours")
      seeds = axis("seed", {str(seed): {"train.seed": seed, "data.seed": seed} for seed in range(3)})
      return Sweep(base_config(), product(arms, seeds))

`+` puts lists of runs after one another, `product` combines them, `zipped` takes them side by side. Fields are
checked where they are written, values when a run is resolved: a run that
nobody selects may need a method that is not there.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import ml_collections

from moe_lab.config.load import call
from moe_lab.config.resolve import FIELDS, from_dict, unknown_field
from moe_lab.config.schema import Config
from moe_lab.errors import ConfigError, UserError, did_you_mean

FOLDER = re.compile(r"\w[\w.+=-]*")


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep, or a part of one before `product` has put it together.

  Attributes:
    labels: axis -> the option taken, in the order of the axes.
    overrides: dotted field -> value.
    notes: what a study wants to know about the run besides, such as its role.
  """

  labels: Mapping[str, str]
  overrides: Mapping[str, object]
  notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """The labels joined: the run's folder."""
    return "-".join(self.labels.values())


def axis(name: str, options: Mapping[str, Mapping[str, object]], **notes: str) -> list[Run]:
  """Returns a run for each option: its label, and the fields it sets.

  Raises:
    UserError: a name that is no field; the line says of which option.
  """
  for number, (label, overrides) in enumerate(options.items(), 1):
    for field, value in overrides.items():
      if field not in FIELDS:
        place = f"sweep axis {name!r}, entry {number} of {len(options)}, {label}"
        raise UserError(f"{place}: {unknown_field(field, value)}")
  return [Run({name: label}, dict(overrides), notes) for label, overrides in options.items()]


def product(*parts: Sequence[Run]) -> list[Run]:
  """Returns every combination of one run from each part, the last part changing fastest.

  Raises:
    ConfigError: two parts set one field to different values: which one holds would depend on their order.
  """
  return [_merged(combination) for combination in itertools.product(*parts)]


def zipped(*parts: Sequence[Run]) -> list[Run]:
  """Returns the first runs of all parts as one, the second ones as one, and so on: axes that move together.

  Raises:
    UserError: parts of different lengths.
    ConfigError: as `product`.
  """
  if len(lengths := {len(part) for part in parts}) > 1:
    raise UserError(f"sweep: zipped parts have {', '.join(map(str, sorted(lengths)))} runs: wanted as many in each")
  return [_merged(together) for together in zip(*parts, strict=True)]


def _merged(runs: Sequence[Run]) -> Run:
  labels, overrides, notes = {}, {}, {}
  for run in runs:
    for field, value in run.overrides.items():
      if overrides.setdefault(field, value) != value:
        raise ConfigError(field, value, f"one value a run, and {'-'.join(labels.values())} has {overrides[field]!r}")
    labels |= run.labels
    notes |= run.notes
  return Run(labels, overrides, notes)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs over one base configuration.

  Raises:
    UserError: two runs have one name, or a name cannot be a folder's.
  """

  base: ml_collections.ConfigDict
  runs: list[Run]

  def __post_init__(self):
    names = [run.name for run in self.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
      count = names.count(twice[0])
      raise UserError(f"sweep: {count} runs are called {twice[0]!r}: wanted a label that tells them apart")
    for name in names:
      if not FOLDER.fullmatch(name):
        wanted = "labels of letters, digits and . _ - + =, since they name its folder"
        raise UserError(f"sweep: a run is called {name!r}: wanted {wanted}")

  def config(self, run: Run) -> Config:
    """Returns the resolved configuration of a run; ConfigError for a value that cannot be."""
    raw = self.base.to_dict()
    for field, value in run.overrides.items():
      if field not in FIELDS:  # a run that no axis made
        raise unknown_field(field, value)
      section, _, name = field.partition(".")
      raw[section][name] = value
    return from_dict(raw)

  def configs(self) -> dict[str, Config]:
    """Returns name -> resolved configuration of all runs, so that no mistake waits for its turn.

    Raises:
      UserError: a value that cannot be; the line says of which entry.
    """
    found = {}
    for number, run in enumerate(self.runs, 1):
      try:
        found[run.name] = self.config(run)
      except ConfigError as error:
        raise UserError(f"sweep entry {number} of {len(self.runs)}, {run.name}: {error}") from None
    return found

  def select(self, chosen: Mapping[str, tuple[str, Sequence[str]]]) -> "Sweep":
    """Returns the runs whose labels are among those chosen.

    Args:
      chosen: flag -> (axis, labels); no labels: all runs, also those without that axis.

    Raises:
      UserError: a label that no run has, or no run left.
    """
    chosen = {flag: (name, labels) for flag, (name, labels) in chosen.items() if labels}
    for flag, (name, labels) in chosen.items():
      known = list(dict.fromkeys(run.labels[name] for run in self.runs if name in run.labels))
      for label in labels:
        if label not in known:
          raise UserError(f"--{flag}={label}: wanted some of {', '.join(known) or 'none'}{did_you_mean(label, known)}")
    runs = [run for run in self.runs if all(run.labels.get(name) in labels for name, labels in chosen.values())]
    if not runs:
      asked = " ".join(f"--{flag}={','.join(labels)}" for flag, (_, labels) in chosen.items())
      raise UserError(f"{asked or 'sweep'}: wanted at least one run, and no run has all of these")
    return Sweep(self.base, runs)


def load_sweep(spec: str) -> Sweep:
  """Returns the sweep of `FILE.py` or `FILE.py:arg`.

  Raises:
    UserError: one line for whatever is wrong with the file, as for a config file.
  """
  sweep = call(spec, flag="sweep", function="get_sweep", folder="configs/sweeps")
  if not isinstance(sweep, Sweep):
    raise UserError(f"--sweep={spec}: get_sweep() returned {type(sweep).__name__}: wanted a Sweep(base, runs)")
  return sweep
