"""Measures speed and memory, with the peers beside us in the same run.

    python -m experiments.benchmark train_step --k=2
    python -m experiments.benchmark train_step --method=dynamic --k=1,2,4,8 --peers=none
    python -m experiments.benchmark moe_layer --experts=16x512,64x128 --k=8
    python -m experiments.benchmark attention|decode|data
    python -m experiments.benchmark cost --workdir=runs/any --k=2,1,4 --price_per_hour=2.5     # of responses
    python -m experiments.benchmark long_attention   # half an hour: 16K to 256K tokens, with and without skipping
    python -m experiments.benchmark tpu_compile|tpu_long_context      # ahead of time, without a TPU; needs libtpu
    python -m experiments.benchmark presets|weak_scaling              # half an hour each: preflights, likewise
    python -m experiments.benchmark offload                           # a plan for 24 GB, in seconds
    python -m experiments.benchmark serve                             # a quarter of an hour: the server under load

Contenders take turns, each in a process of its own (those of `cost` share one,
and a model). The table goes to stderr and, with the figures and the machine,
into dated files under --out; the result is the last line on stdout. Peers need
`pip install -e .[peers]`; a peer that is not installed is left out and said so.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import logging
import math
import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError, did_you_mean

REPORTS = (
  "long_attention",
  "tpu_compile",
  "tpu_long_context",
  "weak_scaling",
  "presets",
  "offload",
  "serve",
)  # each decides for itself what it measures
BENCHMARKS = ("train_step", "moe_layer", "attention", "decode", "data", "cost", *REPORTS)
COST_FLAGS = ("concurrency", "responses", "price_per_hour", "grid_g_per_kwh", "workdir")  # of `cost` alone
IMPLEMENTATIONS = ("eager", "grouped_mm")  # of experts, in transformers
METHODS = ("topk", "dynamic", "dynamic_rollouts", "overflow")

FLAGS = flags.FlagValues()
flags.DEFINE_list(
  "k",
  [],
  "Experts per token, or the mean of a dynamic method; several: 1,2,4. Of cost: budgets, the first for every number of "
  "clients.",
  flag_values=FLAGS,
)
flags.DEFINE_list("method", ["topk"], f"Routing: {', '.join(METHODS)}.", flag_values=FLAGS)
flags.DEFINE_list("experts", [], "Number and hidden width of experts, as in 16x512,64x128.", flag_values=FLAGS)
flags.DEFINE_enum("preset", "auto", ["auto", "cpu", "gpu"], "The shapes; auto: by what is here.", flag_values=FLAGS)
flags.DEFINE_enum(
  "peers",
  "all",
  ["all", "none", *IMPLEMENTATIONS],
  "Which peers to measure; one of transformers' implementations of experts where not all fit a GPU side by side.",
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  "rounds", 5, "Turns of each contender, of two timed runs and one before them.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
  "concurrency", 8, "Of cost: the most requests at a time; measured are 1, 2, 4 ... and it.", 1, flag_values=FLAGS
)
flags.DEFINE_integer("responses", 100, "Of cost: responses a row, over all rounds.", 1, flag_values=FLAGS)
flags.DEFINE_float(
  "price_per_hour", None, "Of cost: of one device, in any currency; tells prices.", 0, flag_values=FLAGS
)
flags.DEFINE_float(
  "grid_g_per_kwh", None, "Of cost: grams of CO2 that the grid emits for a kWh; tells carbon.", 0, flag_values=FLAGS
)
flags.DEFINE_string("out", "benchmarks/results", "The folder of the dated files.", flag_values=FLAGS)

log = logging.getLogger("experiments.benchmark")


def main(benchmark: str, workdir: Path | None = None) -> dict:
  """Returns the result of one benchmark; `workdir`: the run that `cost` serves, by default a model made for it."""
  if "overflow" in FLAGS.method and benchmark != "moe_layer":
    raise UserError(f"--method=overflow: wanted with moe_layer only, not {benchmark}")
  if benchmark not in BENCHMARKS:
    raise UserError(
      f"benchmark {benchmark!r}: wanted one of {', '.join(BENCHMARKS)}{did_you_mean(benchmark, BENCHMARKS)}"
    )
  if benchmark == "cost":
    _check_cost_flags(workdir)
  elif given := [name for name in COST_FLAGS if FLAGS[name].present]:
    raise UserError(f"--{given[0]}: wanted with cost only, not {benchmark}")
  from benchmarks import machine, plot, results
  from benchmarks.measure import measure
  from moe_lab.io.files import write_text

  described = machine.describe()
  command = "python -m experiments.benchmark " + " ".join(sys.argv[1:])
  if benchmark in REPORTS:
    if given := [name for name in FLAGS if name != "out" and FLAGS[name].present]:
      raise UserError(f"--{given[0]}: wanted --out or nothing with {benchmark}")
    module = importlib.import_module(f"benchmarks.{benchmark}")
    found = module.report(log.info)
    path = module.save(Path(FLAGS.out), found, described, command)
    print(f"\n{path.read_text()}\n{path}", file=sys.stderr)
    return {"benchmark": benchmark, "machine": described, "results": found, "file": path}
  preset = FLAGS.preset if FLAGS.preset != "auto" else ("gpu" if described["accelerator"] else "cpu")
  if benchmark == "cost":
    return _cost(workdir, preset, described, command)
  contenders = _contenders(benchmark, _cases(benchmark, preset), preset)
  measured, peak = measure(contenders, FLAGS.rounds, preset, log.info)
  result = results.summary(benchmark, measured, peak, described)
  text = results.table(measured, peak)
  path = results.save(Path(FLAGS.out), benchmark, text, result, command)
  if drawing := plot.page_of(plot.time_by_experts(measured), text, command):
    write_text(path.with_suffix(".html"), drawing)
  print(f"\n{text}\n\n{path}", file=sys.stderr)
  return result | {"file": path}


def _check_cost_flags(workdir: Path | None) -> None:
  for name in ("method", "peers"):
    if FLAGS[name].present:
      raise UserError(
        f"--{name}: wanted without it: cost measures a model's own counts beside fixed ones, and no peers"
      )
  for name in ("experts", "preset"):
    if FLAGS[name].present and workdir is not None:
      raise UserError(f"--{name}: wanted without --workdir: the run's model has shapes of its own")
  if len(FLAGS.experts) > 1:
    raise UserError(f"--experts={','.join(FLAGS.experts)}: wanted one size with cost")
  for name in ("price_per_hour", "grid_g_per_kwh"):
    value = getattr(FLAGS, name)
    if value is not None and not math.isfinite(value):
      raise UserError(f"--{name}={value}: wanted a finite number")


def _cost(workdir: Path | None, preset: str, described: dict, command: str) -> dict:
  """Returns the result of `cost`: latency, throughput, energy and price of responses."""
  from benchmarks import cost, cost_page, served
  from benchmarks.case import PRESETS
  from moe_lab.io.run import load_run

  if workdir is None:
    num_experts, expert_dim = _size(FLAGS.experts[0]) if FLAGS.experts else (PRESETS[preset].num_experts, None)
    case = dataclasses.replace(
      PRESETS[preset], num_experts=num_experts, expert_dim=expert_dim or PRESETS[preset].expert_dim
    )
    routing = served.made_config(case, (2.0, 4.0)).routing
    low, high, default = routing.budgets[0], float(routing.k_max), (2.0, *routing.budgets)
  else:
    routing = load_run(workdir)[0].routing
    (low, high), default = routing.budgets, (routing.mean_count, *routing.budgets)
  budgets = tuple(dict.fromkeys(_budget(text, low, high) for text in FLAGS.k) or dict.fromkeys(default))
  settings = cost.Settings(
    budgets, FLAGS.concurrency, FLAGS.responses, FLAGS.rounds, FLAGS.price_per_hour, FLAGS.grid_g_per_kwh
  )
  if FLAGS.responses < cost.ENOUGH:
    log.warning("--responses=%d: a p99 wants %d and more", FLAGS.responses, cost.ENOUGH)
  model = served.made(case, budgets) if workdir is None else served.loaded(workdir)
  found = cost.report(model, served.prompts(model, budgets), settings, log.info)
  path = cost_page.save(Path(FLAGS.out), found, described, command)
  print(f"\n{path.read_text()}\n{path}", file=sys.stderr)
  return {"benchmark": "cost", "machine": described} | found | {"file": path}


def _budget(text: str, low: float, high: float) -> float:
  try:
    budget = float(text)
  except ValueError:
    raise UserError(f"--k={text}: wanted a number") from None
  if not low <= budget <= high:
    wanted = f"{low:g}" if low == high else f"a number from {low:g} to {high:g}"
    raise UserError(f"--k={text}: wanted {wanted}, what the model is trained for")
  return budget


def _cases(benchmark: str, preset: str) -> list:
  """Returns the cases that the flags ask for: every method with every number of experts and every k."""
  from benchmarks.case import PRESETS

  base = PRESETS[preset]
  for method in FLAGS.method:
    if method not in METHODS:
      raise UserError(f"--method={method}: wanted one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
  sizes = [_size(text) for text in FLAGS.experts] or [(base.num_experts, base.expert_dim)]
  cases = []
  for method, (num_experts, expert_dim), k in itertools.product(FLAGS.method, sizes, FLAGS.k or [base.k]):
    case = dataclasses.replace(base, method=method, num_experts=num_experts, expert_dim=expert_dim, k=_k(k, method))
    cases.append(case)
  if benchmark == "decode":
    cases = _decode_cases(cases)
  for case in cases:
    case.config()  # a mistake shows here, in one line, and not in a contender
  return cases


def _size(text: str) -> tuple[int, int]:
  number, _, width = text.partition("x")
  if not (number.isdigit() and width.isdigit()):
    raise UserError(f"--experts={text}: wanted NUMBERxWIDTH, as in 64x128")
  return int(number), int(width)


def _k(text: object, method: str) -> float:
  try:
    k = float(text)
  except ValueError:
    raise UserError(f"--k={text}: wanted a number") from None
  if method == "topk" and k != int(k):
    raise UserError(f"--k={text}: wanted a whole number, since --method is topk")
  return k


def _contenders(benchmark: str, cases: list, preset: str) -> list:
  """Returns who is measured at what: ours at every case, the peers where they have such a case."""
  from benchmarks.worker import Contender

  attention = ("flash", "blocked") if preset == "gpu" else ("native", "blocked", "reference")
  ours = {"attention": attention}.get(benchmark, ("",))
  peers = {"attention": ("",), "data": ("",)}.get(benchmark, IMPLEMENTATIONS)
  missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
  if FLAGS.peers in IMPLEMENTATIONS:
    if FLAGS.peers not in peers:
      raise UserError(f"--peers={FLAGS.peers}: wanted all or none with {benchmark}")
    peers = (FLAGS.peers,)
  if FLAGS.peers == "none":
    peers = ()
  elif missing:
    log.warning("no peers: %s not installed (pip install -e .[peers])", " and ".join(missing))
    peers = ()
  contenders = []
  for case in cases:
    contenders += [Contender("ours", benchmark, case, variant) for variant in ours]
    if case.method == "topk":
      contenders += [Contender("peer", benchmark, case, variant) for variant in peers]
      if benchmark == "train_step" and preset == "cpu" and peers:
        # torch on CPU gains much from an allocator that keeps its memory; its users seldom set it, so it is told apart.
        contenders.append(Contender("peer", benchmark, case, peers[-1], keep_memory=True))
    elif benchmark == "decode":
      contenders += [Contender("ours", benchmark, case, variant) for variant in ("steady", "equal")]
  return contenders


def _decode_cases(cases: list) -> list:
  """Returns the cases of `decode`: each at its numbers of sequences, and the times of tokens under a mix of prompts."""
  from benchmarks.case import MIXED, SEQUENCES

  fixed = [dataclasses.replace(case, sequences=n) for case in cases if case.method == "topk" for n in SEQUENCES]
  mixed = [dataclasses.replace(case, sequences=SEQUENCES[-1], **MIXED) for case in cases]
  return fixed + list(dict.fromkeys(mixed))  # whatever k of the others


if __name__ == "__main__":
  program.run(main, FLAGS, one_arena=False)  # `cost` decodes in this process
