"""Trains the runs of a sweep, side by side here or on a cluster, and compares them in a table and on a page.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=runs/widths --workers=2
    python -m experiments.sweep --sweep=... --workdir=... --launcher=ray --ray_address=head:6379
    python -m experiments.sweep --sweep=... --workdir=... --launcher=slurm --partition=gpu --gpus_per_run=1
    python -m experiments.sweep --sweep=... --workdir=... --launcher=jobset --topology=v5p:2x2x4 --image=... --claim=...

Every run is resolved before the first one starts. Each has a folder of its own in WORKDIR. Started again with the same
command the sweep goes on: finished runs are taken as they are, the others continue from their checkpoints. A run that
fails is recorded, and the others go on. The table goes to stderr and the page to WORKDIR/sweep.html; the last line on
stdout is the JSON result. `jobset` writes files for kubectl, and launches nothing. Exit code 75 after SIGTERM: saved,
start again.
"""

import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.config.sweep import Sweep, load_sweep
from moe_lab.errors import RunError, UserError, visible

FLAGS = flags.FlagValues()
flags.DEFINE_string("sweep", None, "A sweep file, FILE.py[:arg].", flag_values=FLAGS)
flags.DEFINE_enum("launcher", "local", ["local", "ray", "slurm", "jobset"], "Who runs the runs.", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "Only resolve the runs, and tell which there are.", flag_values=FLAGS)
flags.DEFINE_integer(
  "workers",
  1,
  "local: runs side by side, each on its share of the cores. slurm: jobs that may run at the same time.",
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer("cpus_per_run", 1, "ray, slurm: cores of a run.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("gpus_per_run", 0, "ray, slurm: GPUs of a run.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer(
  "retries",
  3,
  "How often a run may go on after its node died (ray), its time limit (slurm), a failure (jobset).",
  lower_bound=0,
  flag_values=FLAGS,
)
flags.DEFINE_string("ray_address", "auto", "ray: HOST:PORT of the cluster's head.", flag_values=FLAGS)
flags.DEFINE_enum(
  "cluster", "slurm", ["slurm", "local"], "slurm: local takes processes of this machine instead.", flag_values=FLAGS
)
flags.DEFINE_string("partition", "", "slurm: by default the cluster's own.", flag_values=FLAGS)
flags.DEFINE_integer("minutes", 240, "slurm: time limit of a job.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("topology", None, "jobset: a slice, such as v5p:4x4x8.", flag_values=FLAGS)
flags.DEFINE_string("image", None, "jobset: the container's image.", flag_values=FLAGS)
flags.DEFINE_string("claim", None, "jobset: a PersistentVolumeClaim, mounted at --workdir.", flag_values=FLAGS)

_TAKES = {  # launcher -> its own flags
  "local": ("workers",),
  "ray": ("ray_address", "cpus_per_run", "gpus_per_run", "retries"),
  "slurm": ("workers", "cluster", "partition", "minutes", "cpus_per_run", "gpus_per_run", "retries"),
  "jobset": ("topology", "image", "claim", "retries"),
}
_NEEDS = {"jobset": ("topology", "image", "claim")}


def main(workdir: Path) -> dict:
  """Trains the runs of the sweep that are not finished, and compares all of them."""
  _check_flags()
  sweep = load_sweep(FLAGS.sweep)
  configs = sweep.configs()
  if not configs:
    raise UserError(f"--sweep={FLAGS.sweep}: wanted at least one run")
  from moe_lab.io.run import check_config

  for name, config in configs.items():
    check_config(workdir / name, config)
  if FLAGS.dry_run:
    return _told(sweep, configs, workdir)
  if FLAGS.launcher == "jobset":
    return _rendered(sweep, configs, workdir)
  return _trained(sweep, configs, workdir)


def _check_flags() -> None:
  if not FLAGS.sweep:
    raise UserError("--sweep: wanted a sweep file, as in --sweep=configs/sweeps/quickstart.py")
  mine = _TAKES[FLAGS.launcher]
  for name in sorted({name for names in _TAKES.values() for name in names} - set(mine)):
    if FLAGS[name].present:
      takers = " or ".join(launcher for launcher, names in _TAKES.items() if name in names)
      raise UserError(f"--{name}={FLAGS[name].value}: wanted with --launcher={takers} only, not {FLAGS.launcher}")
  for name in _NEEDS.get(FLAGS.launcher, ()):
    if not FLAGS[name].value:
      raise UserError(f"--{name}: wanted with --launcher={FLAGS.launcher}")


def _told(sweep: Sweep, configs: dict, workdir: Path) -> dict:
  """Tells the runs, what each sets, and which are finished."""
  from moe_lab.io.run import is_finished

  finished = [name for name, config in configs.items() if is_finished(workdir / name, config)]
  for run in sweep.runs:
    fields = " ".join(f"{field}={value}" for field, value in run.overrides.items())
    print(f"{run.name}{' (finished)' if run.name in finished else ''}: {fields}", file=sys.stderr)
  return {"runs": list(configs), "finished": finished, "workdir": workdir}


def _rendered(sweep: Sweep, configs: dict, workdir: Path) -> dict:
  from moe_lab.launch.jobset import Pod, write_jobsets

  pod = Pod(FLAGS.topology, FLAGS.image, FLAGS.claim, FLAGS.retries)
  files = write_jobsets(workdir, configs, pod)
  _save(sweep, workdir, {})
  print(f"to launch: kubectl apply -f {workdir / 'jobset'}", file=sys.stderr)
  print(f"to compare: python -m experiments.report --workdir={workdir}", file=sys.stderr)
  return {"runs": len(files), "files": files, "workdir": workdir}


def _trained(sweep: Sweep, configs: dict, workdir: Path) -> dict:
  from experiments.sweep_run import Job
  from moe_lab.io.lock import RunLock
  from moe_lab.launch import local
  from moe_lab.report.sweep_page import write_sweep_report
  from moe_lab.report.sweep_runs import best_first, groups_of, read_sweep, sweep_text
  from moe_lab.train.signals import Preemption

  # Absolute: processes of a cluster have working directories of their own.
  jobs = [Job(workdir.absolute() / name, config, sys.argv) for name, config in configs.items()]
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(workdir)  # of the sweep: two of them would do the same runs
  except OSError as error:
    raise UserError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from error
  failed: dict[str, str] = {}
  try:
    with Preemption() as preemption:
      done = _launched(jobs, workdir, local.stop_of(preemption))
      for number, (job, outcome) in enumerate(zip(jobs, done, strict=True), 1):
        name = job.folder.name
        if outcome["failed"]:
          failed[name] = outcome["failed"]
        _save(sweep, workdir, failed)
        page = write_sweep_report(workdir)
        print(f"[{number}/{len(jobs)}] {name}: {visible(outcome['failed'] or 'finished')}", file=sys.stderr, flush=True)
  finally:
    lock.release()
  compared = read_sweep(workdir)
  print(sweep_text(compared), file=sys.stderr, flush=True)
  if failed:
    told = "; ".join(f"{name}: {why}{_log_of(workdir / name)}" for name, why in failed.items())
    raise RunError(f"{len(failed)} of {len(jobs)} runs failed: {told}")
  return {
    "runs": len(jobs),
    "val_loss": {run["name"]: run["result"]["val_loss"] for run in compared["runs"]},
    "best": best_first(groups_of(compared["runs"]))[0]["name"],
    "report": page,
    "workdir": workdir,
  }


def _launched(jobs: list, workdir: Path, stop):
  """Returns the outcomes of the jobs, in their order, as they come."""
  from experiments.sweep_run import perform

  if FLAGS.launcher == "ray":
    from moe_lab.launch import ray_cluster

    cluster = ray_cluster.Cluster(FLAGS.ray_address, FLAGS.cpus_per_run, FLAGS.gpus_per_run, FLAGS.retries)
    return ray_cluster.performed(jobs, perform, cluster, stop)
  if FLAGS.launcher == "slurm":
    from moe_lab.launch import slurm

    at_once = FLAGS.workers if FLAGS["workers"].present else len(jobs)
    cluster = slurm.Cluster(
      FLAGS.cluster, FLAGS.partition, FLAGS.minutes, FLAGS.cpus_per_run, FLAGS.gpus_per_run, FLAGS.retries, at_once
    )
    return slurm.performed(jobs, perform, cluster, workdir / "slurm", stop)
  from moe_lab.launch import local

  return local.performed(jobs, perform, FLAGS.workers, stop)


def _save(sweep: Sweep, workdir: Path, failed: dict[str, str]) -> None:
  """Writes sweep.json (moe_lab/report/sweep_runs.py)."""
  from moe_lab.io.files import dump_json, write_text

  runs = [
    {
      "name": run.name,
      "labels": run.labels,
      "overrides": run.overrides,
      "failed": failed.get(run.name),
      "log": f"{run.name}.log" if (workdir / f"{run.name}.log").is_file() else None,
    }
    for run in sweep.runs
  ]
  command = " ".join(["python -m experiments.sweep", *sys.argv[1:]])
  record = {"sweep": FLAGS.sweep, "launcher": FLAGS.launcher, "command": command, "runs": runs}
  write_text(workdir / "sweep.json", dump_json(record, indent=1) + "\n")


def _log_of(folder: Path) -> str:
  log = folder.with_name(folder.name + ".log")
  return f" (log: {log})" if log.is_file() else ""


if __name__ == "__main__":
  program.run(main, FLAGS)
