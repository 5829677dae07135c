"""A run on TPU pods as a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2) for GKE: rendered, not launched.

One pod a host, one job a slice, all of them one run; jax finds the other hosts by what GKE and the JobSet put into a
pod's environment. Exit code 75 and the loss of a node begin the run again, from its checkpoint, as often as they
happen; any other failure, up to so many times.

Slices, their labels and their hosts: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. What may begin again:
jobset.sigs.k8s.io, "Failure Policy".
"""

import dataclasses
import math
import re
from pathlib import Path

import yaml

from moe_lab.config.resolve import diff
from moe_lab.config.schema import Config
from moe_lab.errors import PREEMPTED, UserError, did_you_mean
from moe_lab.io import lock

_SAVING = 300  # seconds that a pod has between SIGTERM and its end
_LONGEST = 40  # characters of a JobSet's name: Kubernetes adds slice, host and a suffix to make a pod's, of 63


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A kind of slice: GKE's name for it, how many numbers its topology has, and the chips of its largest single host."""

  accelerator: str
  dims: int
  single_host: int


_KINDS = {
  "v4": _Kind("tpu-v4-podslice", 3, 4),
  "v5e": _Kind("tpu-v5-lite-podslice", 2, 8),
  "v5p": _Kind("tpu-v5p-slice", 3, 4),
  "v6e": _Kind("tpu-v6e-slice", 2, 8),
}
_CHIPS_A_HOST = 4  # of a slice of several hosts


@dataclasses.dataclass(frozen=True)
class Pod:
  """Where to run.

  Attributes:
    topology: of one slice, as in `experiments.preflight`: "v5p:4x4x8".
    image: of the container, with this package installed in its Python and the repository as working directory.
    claim: a PersistentVolumeClaim that all hosts can write, mounted where the run's folder is.
    retries: how often the run may begin again after a failure that is no preemption.
  """

  topology: str
  image: str
  claim: str
  retries: int


def write_jobsets(workdir: Path, configs: dict[str, Config], pod: Pod) -> list[Path]:
  """Writes `workdir`/jobset/NAME.yaml for each run; `kubectl apply -f workdir/jobset` then starts them all.

  Args:
    workdir: of the sweep: the claim is mounted there, under its absolute path, in the containers.
    configs: run -> its configuration.
    pod: where to run.

  Raises:
    UserError: no such topology, a mesh that does not fit it, or two runs whose names are one in Kubernetes.
  """
  names: dict[str, str] = {}
  documents = {}
  for run, config in configs.items():
    name = _name(workdir.absolute().name, run)
    if name in names:
      raise UserError(f"sweep: the runs {names[name]!r} and {run!r} would both be the JobSet {name!r}")
    names[name] = run
    documents[run] = jobset(name, workdir.absolute(), run, config, pod)
  folder = workdir / "jobset"
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for run, document in documents.items():
    paths.append(folder / f"{run}.yaml")
    paths[-1].write_text(yaml.safe_dump(document, sort_keys=False, width=10_000))
  return paths


def jobset(name: str, workdir: Path, run: str, config: Config, pod: Pod) -> dict:
  """Returns the document of one run.

  Args:
    name: of the JobSet.
    workdir: of the sweep, absolute; the run is in `workdir/run`.
    run: its name.
    config: of the run; `config.mesh.slices` is the number of slices.
    pod: where to run.

  Raises:
    UserError: no such topology, or a mesh that does not fit it.
  """
  kind, chips = _slice(pod.topology)
  slices = config.mesh.slices
  config.mesh.sizes(chips * slices)  # says what does not fit
  hosts = 1 if chips <= kind.single_host else chips // _CHIPS_A_HOST
  container = {
    "name": "train",
    "image": pod.image,
    "command": ["python", "-m", "experiments.train", *_flags(config), f"--workdir={workdir / run}"],
    "env": [{"name": lock.JOB, "value": f"jobset {name}"}],
    "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of TPU hosts to each other, and of multislice
    "resources": {key: {"google.com/tpu": chips // hosts} for key in ("requests", "limits")},
    "volumeMounts": [{"name": "runs", "mountPath": str(workdir), "subPath": workdir.name}],
  }
  pod_spec = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": _SAVING,
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": kind.accelerator,
      "cloud.google.com/gke-tpu-topology": pod.topology.partition(":")[2],
    },
    "containers": [container],
    "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": pod.claim}}],
  }
  job = {
    "completionMode": "Indexed",
    "parallelism": hosts,
    "completions": hosts,
    "backoffLimit": 0,  # a host alone cannot go on: the JobSet begins again with all of them
    "podFailurePolicy": {
      "rules": [
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [PREEMPTED]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
      ]
    },
    "template": {"spec": pod_spec},
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": name,
      # A job has a node pool, which is a slice, to itself.
      "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    },
    "spec": {
      "failurePolicy": {
        "maxRestarts": pod.retries,
        # That is: a rule of podFailurePolicy matched, the run was preempted.
        "rules": [{"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}],
      },
      "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
    },
  }


def _flags(config: Config) -> list[str]:
  """Returns the flags that make `config` of the defaults."""
  changed = [f"--config.{field}={value}" for field, _, value in diff(Config(), config)]
  return ["--config=configs/defaults.py", *changed]


def _slice(topology: str) -> tuple[_Kind, int]:
  """Returns the kind of a topology, and its chips."""
  kind, _, shape = topology.partition(":")
  wanted = "one as TPUs are sold, such as v5p:4x4x8 or v5e:4x4"
  if kind not in _KINDS:
    raise UserError(f"--topology={topology}: wanted {wanted}, of {', '.join(_KINDS)}{did_you_mean(kind, _KINDS)}")
  sizes = shape.split("x")
  if len(sizes) != _KINDS[kind].dims or not all(re.fullmatch("[1-9][0-9]*", size) for size in sizes):
    raise UserError(f"--topology={topology}: wanted {wanted}: {_KINDS[kind].dims} numbers for {kind}")
  chips = math.prod(map(int, sizes))
  if chips > _KINDS[kind].single_host and chips % _CHIPS_A_HOST:
    raise UserError(
      f"--topology={topology}: wanted {wanted}: whole hosts of {_CHIPS_A_HOST} chips, and this has {chips}"
    )
  return _KINDS[kind], chips


def _name(*parts: str) -> str:
  """Returns a name as Kubernetes has them: lower-case letters, digits and -."""
  name = re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
  if not name[:1].isalpha():
    name = f"run-{name}"
  if len(name) > _LONGEST:
    raise UserError(
      f"the JobSet {name!r} has a name of {len(name)} characters: wanted {_LONGEST}, with --workdir's own"
    )
  return name
