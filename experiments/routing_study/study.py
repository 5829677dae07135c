"""Every routing method on the same axes at equal measured compute: trains a sweep, measures it, writes table and page.

    python -m experiments.routing_study.study --sweep=configs/sweeps/routing_study.py --workdir=runs/routing_study

Each run has a folder of its own in WORKDIR. Started again with the same command
it goes on: finished runs are taken as they are, interrupted ones continue. What
is measured goes to WORKDIR/study-SPLIT.json and, for people, to the page beside
it; the table goes to stderr, and the last line on stdout is the JSON result.
Exit code 75 after SIGTERM: saved, start again.
"""

import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.config.sweep import Sweep, load_sweep
from moe_lab.errors import RunError

FLAGS = flags.FlagValues()
flags.DEFINE_string("sweep", "configs/sweeps/routing_study.py", "A sweep file, FILE.py[:arg].", flag_values=FLAGS)
flags.DEFINE_enum(
  "split", "validation", ["validation", "test"], "Tune on validation; report, once, on test.", flag_values=FLAGS
)
flags.DEFINE_integer(
  "workers",
  1,
  "Runs side by side, each on its share of the cores: on CPU, small models do best with one core each.",
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_list("arms", [], "Some of the sweep's arms; by default all.", flag_values=FLAGS)
flags.DEFINE_list("seeds", [], "Some of its seeds.", flag_values=FLAGS)
flags.DEFINE_list("corpora", [], "Some of its corpora.", flag_values=FLAGS)


def main(workdir: Path) -> dict:
  """Trains and measures the runs that the flags select, and puts them together."""
  chosen = {"arms": ("arm", FLAGS.arms), "seeds": ("seed", FLAGS.seeds), "corpora": ("corpus", FLAGS.corpora)}
  sweep = load_sweep(FLAGS.sweep).select(chosen)
  configs = sweep.configs()

  from experiments.routing_study import measure, results, runner
  from moe_lab.launch import local
  from moe_lab.train.signals import Preemption

  for run in sweep.runs:
    measure.rules_of(run.notes)
  jobs = [
    runner.Job(workdir / run.name, configs[run.name], dict(run.notes), FLAGS.split, sys.argv) for run in sweep.runs
  ]

  records = []
  with Preemption() as preemption:
    done = local.performed(jobs, runner.perform, FLAGS.workers, local.stop_of(preemption))
    for run, measured in zip(sweep.runs, done, strict=True):
      records.append({"name": run.name, "labels": run.labels, "notes": run.notes} | measured)
      print(f"[{len(records)}/{len(jobs)}] {run.name}: {results.line(records[-1])}", file=sys.stderr, flush=True)
      study = _study(records, sweep)
      results.save(workdir, study)
  print(results.text(study), file=sys.stderr, flush=True)
  if all(record["failed"] for record in records):
    raise RunError(f"every run failed; the first: {records[0]['failed']}")
  return results.summary(study) | {"workdir": workdir}


def _study(records: list[dict], sweep: Sweep) -> dict:
  from experiments.routing_study import analyses, arms

  groups = arms.arms_of(records)
  return {
    "sweep": FLAGS.sweep,
    "split": FLAGS.split,
    "command": " ".join(["python -m experiments.routing_study.study", *sys.argv[1:]]),
    "arms": arms.rows(groups),
    "comparisons": arms.comparisons(groups),
    "conditioned": arms.conditioned(groups),
    "experts_needed": analyses.experts_needed(groups, sweep.base.routing.k_max),
    "removals": analyses.removals(groups),
    "against_dense": analyses.against_dense(groups),
    "scaling": analyses.scaling_fits(groups),
    "runs": records,
  }


if __name__ == "__main__":
  program.run(main, FLAGS)
