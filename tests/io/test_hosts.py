"""Which clusters start several processes; and what is agreed upon by one alone."""

import os

import pytest

from moe_lab.errors import UserError
from moe_lab.io import hosts

SLURM = {
  "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
}  # fmt: skip


@pytest.fixture
def around(monkeypatch):
  """Returns a function that makes this environment the process's, instead of any cluster's."""

  def around(**environment):
    for name in list(os.environ):
      if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION")):
        monkeypatch.delenv(name)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)

  return around


@pytest.mark.parametrize(
  "environment, processes",
  [
    ({}, 1),
    (SLURM, 8),
    (SLURM | {"SLURM_NTASKS": "1"}, 1),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 1),  # the shell of an allocation of eight tasks
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, 1),  # a batch script, before srun
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),  # a pod of no indexed job
  ],
)
def test_how_many_processes_a_cluster_says(around, environment, processes):
  around(**environment)
  assert hosts._on_cluster() == processes


def test_a_cluster_that_does_not_say_is_named(around):
  around(**SLURM | {"SLURM_NTASKS": "many"})
  with pytest.raises(UserError, match=r"does not say how many processes .*'many'.*give --num_processes"):
    hosts._on_cluster()


def test_alone_nothing_is_waited_for():
  with hosts.joined(hosts.Hosts(num_processes=1)):
    assert hosts.is_first() and hosts.all_hold(True) and not hosts.all_hold(False)
    hosts.check_same("x", [1, {"a": None}])
    with hosts.first_ahead():
      assert hosts.from_first(lambda: [3]) == [3]
  with pytest.raises(UserError, match="^full$"), hosts.joined(hosts.Hosts(num_processes=1)):
    raise UserError("full")
