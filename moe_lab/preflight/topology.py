"""TPU chips that are not here, for the compiler alone."""

import os

import jax
from jax.experimental import topologies

from moe_lab.errors import UserError, require

# libtpu would ask the cloud which machine this is, and wait for an answer.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody runs anything on a TPU here, so compilers may stand side by side
}


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Returns the chips of a topology, as TPUs are sold: "v5p:4x4x8"; of so many slices of it.

  Raises:
    UserError: there is no compiler for TPU, or no such topology.
  """
  require("libtpu", "compiling for TPU", "tpu")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")  # with libtpu about, jax would look for a TPU to run on
  several = dict(num_slices=slices) if slices > 1 else {}
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices)
  except Exception as error:  # jaxlib raises what libtpu says, of several types
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise UserError(
      f"--topology={topology}: wanted one as TPUs are sold, such as v5p:4x4x8 or v5e:4x4 ({first})"
    ) from None
