"""The flags of a program that runs as several processes, usually one a host."""

import dataclasses

from absl import flags

from moe_lab.errors import UserError

flags.disclaim_key_flags()  # --help lists them with the program's own


@dataclasses.dataclass(frozen=True)
class Hosts:
  """What the command line says about the other processes.

  Attributes:
    coordinator_address: "HOST:PORT" of process 0, where all meet; None: what the cluster says, if there is one.
    num_processes: of the run; 1: this one alone, whatever the cluster says.
    process_id: of this process, from 0.
    initialization_timeout: seconds to wait for all to come.
    heartbeat_timeout: seconds after which a silent process is taken for dead.
    step_timeout: seconds that a training step may take with what follows it; a process that hangs for longer ends. The
      first step is compiled, and a save may wait for a slow disk.
  """

  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  initialization_timeout: int = 300
  heartbeat_timeout: int = 100
  step_timeout: int = 3600

  def __post_init__(self):
    together = ("coordinator_address", "num_processes", "process_id")
    missing = [name for name in together if getattr(self, name) is None]
    given = [name for name in together if name not in missing]
    if self.num_processes is not None and self.num_processes < 1:
      raise UserError(f"--num_processes={self.num_processes}: wanted at least 1")
    if missing and given and (given != ["num_processes"] or self.num_processes > 1):
      wanted = " and ".join(f"--{name}" for name in missing)
      raise UserError(f"--{given[0]}={getattr(self, given[0])}: wanted {wanted} with it, on every process")
    if not missing:
      host, _, port = self.coordinator_address.rpartition(":")
      if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator_address={self.coordinator_address}: wanted HOST:PORT of process 0")
      if not 0 <= self.process_id < self.num_processes:
        raise UserError(f"--process_id={self.process_id}: wanted 0 to {self.num_processes - 1}, below --num_processes")
    for name in ("initialization_timeout", "heartbeat_timeout", "step_timeout"):
      if getattr(self, name) < 1:
        raise UserError(f"--{name}={getattr(self, name)}: wanted at least 1 second")


def define(own: flags.FlagValues) -> None:
  """Adds a flag for each field of `Hosts` to a program's own."""
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, where the processes of a run meet. By default what a TPU pod, Slurm, Open MPI or "
    "Kubernetes says.",
    flag_values=own,
  )
  flags.DEFINE_integer(
    "num_processes", None, "Processes of the run. 1: this one alone, also on a cluster.", flag_values=own
  )
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=own)
  flags.DEFINE_integer(
    "initialization_timeout", Hosts.initialization_timeout, "Seconds to wait for the other processes.", flag_values=own
  )
  flags.DEFINE_integer(
    "heartbeat_timeout",
    Hosts.heartbeat_timeout,
    "Seconds after which a process that says nothing is taken for dead, and the others end.",
    flag_values=own,
  )
  flags.DEFINE_integer(
    "step_timeout",
    Hosts.step_timeout,
    "Seconds that a training step may take with what follows it: a process that hangs for longer ends.",
    flag_values=own,
  )


def given(own: flags.FlagValues) -> Hosts:
  """Returns what the flags say.

  Raises:
    UserError: they do not fit together.
  """
  return Hosts(**{field.name: own[field.name].value for field in dataclasses.fields(Hosts)})
