"""Which axes of the mesh each dimension is spread over: the one file that says so.

A parameter's name ends with its dimensions (`gate_EDF`), in the letters of
`types.py`; a leading dimension that the name does not have is the stack of layers.
So a name says how its array is spread, and so for the optimizer's moments, which have the same names.
"""

import itertools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Devices along these read sequences of their own.
BATCH = ("data", "fsdp", "expert")
AXES = (*BATCH, "sequence", "model")

PARAMETERS = {  # dimension -> the mesh axis that it is spread over
  "V": "model",
  "D": "fsdp",
  "N": "model",
  "M": "model",
  "H": None,
  "E": "expert",
  "F": "model",
  "I": None,
}
# Small ones, of which every device has a copy: gains, and what routers decide by, in float32 and alike everywhere.
COPIED = {
  "gain_D", "gain_H", "router_DE", "null_DU", "threshold_E", "log_scale",
  "policy_in", "policy_bias", "policy_out", "value_in", "value_bias", "value_out",
}  # fmt: skip


def parameter_spec(name: str, num_dims: int) -> P:
  """Returns how a parameter is spread.

  Args:
    name: as the module declares it.
    num_dims: of the array; one more than the name has letters if layers are stacked.

  Raises:
    ValueError: the name is not in the rules.
  """
  if name in COPIED:
    return P()
  letters = name.rpartition("_")[2]
  stacked = num_dims - len(letters)
  if not set(letters) <= PARAMETERS.keys() or stacked not in (0, 1):
    raise ValueError(f"no rule for the parameter {name} with {num_dims} dimensions: sharding/rules.py")
  return P(*(None,) * stacked, *(PARAMETERS[letter] for letter in letters))


def state_specs(state: Any) -> Any:
  """Returns the spec of each leaf of a training state.

  Parameters and what the optimizer has of their names are spread; the rest (controllers, running loads) is copied.
  """

  def one(path, leaf):
    # Names of parameters are keys of dictionaries; the state's own are fields.
    key = path[-1]
    fields = {getattr(part, "name", None) for part in path}
    if not isinstance(key, jax.tree_util.DictKey) or not fields & {"params", "opt_state"}:
      return P()
    return parameter_spec(key.key, leaf.ndim)

  return jax.tree_util.tree_map_with_path(one, state)


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Returns `state_specs` on a mesh."""
  is_spec = lambda x: isinstance(x, P)  # noqa: E731
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state), is_leaf=is_spec)


def params_shardings(params: Any, mesh: Mesh) -> Any:
  """Returns the sharding of each parameter of a model, its layers stacked or not."""

  def one(path, leaf):
    return NamedSharding(mesh, parameter_spec(path[-1].key, leaf.ndim))

  return jax.tree_util.tree_map_with_path(one, params)


def num_along(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
  """Returns how many devices an entry of a spec spreads a dimension over."""
  return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def token_spec(mesh: Mesh | None, batch: int, length: int) -> P:
  """Returns how [B, L, ...] is spread.

  Sequences over the batch axes and their stretches over "sequence". Where there are too few sequences, as at 128K
  tokens, some of the batch axes take one sequence each, if any of them are exactly as many, and the others stretches,
  as do all of them where there are none such. P() where neither number is divisible.
  """
  if mesh is None or mesh.size == 1:
    return P()
  if batch % num_along(mesh, BATCH) == 0 and length % mesh.shape["sequence"] == 0:
    return P(BATCH, "sequence")
  for number in range(len(BATCH)):
    for readers in itertools.combinations(BATCH, number):
      stretches = tuple(axis for axis in (*BATCH, "sequence") if axis not in readers)
      # Several stretches of several sequences each: to see them as one row of tokens, all would have to move.
      if num_along(mesh, readers) == batch and length % num_along(mesh, stretches) == 0:
        return P(readers or None, stretches)
  stretches = (*BATCH, "sequence")
  return P(None, stretches) if length % num_along(mesh, stretches) == 0 else P()


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
  """Returns how rows [B, ...] come to the devices: over the batch axes, or to all where B is not divisible."""
  return NamedSharding(mesh, P(BATCH) if batch % num_along(mesh, BATCH) == 0 else P())


def on_devices(rows: Any, mesh: Mesh) -> Any:
  """Returns arrays [B, ...], which every process has in whole, on the devices; each process feeds its own."""

  def one(x):
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh, len(x)), lambda index: x[index])

  return jax.tree.map(one, rows)


def copied(tree: Any, mesh: Mesh | None) -> Any:
  """Asks for a copy on each device, so that any process can read the arrays; changes nothing on one device."""
  return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def spread(x_BL: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Asks for `token_spec`, of an array [B, L, ...]; changes nothing on one device."""
  spec = token_spec(mesh, *x_BL.shape[:2])
  return x_BL if spec == P() else jax.lax.with_sharding_constraint(x_BL, NamedSharding(mesh, spec))
