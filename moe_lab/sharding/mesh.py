"""The mesh of a run's devices."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_lab.config.mesh import MeshConfig
from moe_lab.sharding.rules import AXES


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh of `AXES`, each with the size that the configuration gives it.

  Neighbours along the later axes, which talk most, are neighbours in the network where its shape is known (TPU);
  elsewhere they are devices of one process, as far as it has enough. With `slices` larger than 1, copies of the model
  ("data") are spread over the slices and nothing else crosses them.

  Args:
    config: of the run.
    devices: to be used; by default all.

  Raises:
    ConfigError: the sizes do not multiply to the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = config.sizes(len(devices))
  shape = tuple(sizes[axis] for axis in AXES)
  if devices[0].platform != "tpu":
    array = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
  elif config.slices > 1:
    across = (config.slices, 1, 1, 1, 1)
    within = (shape[0] // config.slices, *shape[1:])
    array = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
  else:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  # Explicit axes, the default of jax.make_mesh, do not go with Linen and shard_map.
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_or_none(config: MeshConfig) -> Mesh | None:
  """Returns the mesh of all devices, or None for one device, where nothing is to be spread."""
  mesh = make_mesh(config)
  return mesh if mesh.size > 1 else None
