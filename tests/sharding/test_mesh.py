"""The mesh's sizes, and the rules by which arrays are spread over it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, ModelConfig
from moe_lab.errors import ConfigError
from moe_lab.sharding.mesh import make_mesh, mesh_or_none
from moe_lab.sharding.rules import AXES, PARAMETERS, parameter_spec, state_specs
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state


def test_data_takes_the_devices_that_are_left():
  sizes = MeshConfig(fsdp=2, expert=4, model=2).sizes(64)
  assert sizes == {"data": 4, "fsdp": 2, "expert": 4, "sequence": 1, "model": 2}
  assert MeshConfig().sizes(1) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
  "fields, devices, line",
  [
    (dict(expert=3), 8, "mesh = 'fsdp.*= 3': wanted a divisor of the number of devices, 8"),
    (dict(data=3), 8, "mesh.data = 3: wanted 8, so that the axes multiply to the 8 devices"),
    (dict(data=3, expert=3), 8, "mesh.data = 3: wanted 8, the number of devices, as the product of all axes; it is 9"),
    (dict(slices=3), 8, "mesh.slices = 3: wanted a divisor of mesh.data = 8"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(fields, devices, line):
  with pytest.raises(ConfigError, match=line):
    MeshConfig(**fields).sizes(devices)


@pytest.mark.parametrize(
  "mesh, line",
  [
    (dict(fsdp=0), "mesh.fsdp = 0: wanted at least 1"),
    (dict(data=0), "mesh.data = 0"),
    (dict(expert=3), "mesh.expert = 3: wanted a divisor of model.num_experts = 16"),
    (dict(model=3), "mesh.model = 3: wanted a divisor of model.num_kv_heads = 2"),
    (dict(fsdp=3), "mesh.fsdp = 3: wanted a divisor of model.dim = 128"),
  ],
)
def test_axes_that_do_not_divide_the_model_are_refused(mesh, line):
  with pytest.raises(ConfigError, match=line):
    Config(mesh=MeshConfig(**mesh))


def test_one_device_has_no_mesh():
  assert make_mesh(MeshConfig()).axis_names == AXES
  assert mesh_or_none(MeshConfig()) is None


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks of a device that is not here."""

  id: int
  process_index: int
  slice_index: int = 0
  coords: tuple[int, ...] = (0, 0, 0)
  platform: str = "cpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0


def test_copies_of_the_model_are_spread_over_slices_and_nothing_else_is():
  places = [(x, y, 0) for y in range(2) for x in range(2)]
  chips = [Chip(4 * s + i, s, s, place, "tpu") for s in range(2) for i, place in enumerate(places)]
  mesh = make_mesh(MeshConfig(slices=2, expert=2), chips)
  assert mesh.shape["data"] == 4 and mesh.shape["expert"] == 2
  by_copy = [[chip.slice_index for chip in copy.flat] for copy in mesh.devices]
  assert by_copy == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_off_tpu_the_devices_of_a_process_stand_together():
  chips = [Chip(id, id % 2) for id in range(8)]
  by_copy = [[chip.process_index for chip in copy.flat] for copy in make_mesh(MeshConfig(expert=4), chips).devices]
  assert by_copy == [[0] * 4, [1] * 4]


def test_a_name_says_how_its_parameter_is_spread():
  assert parameter_spec("gate_EDF", 4) == P(None, "expert", "fsdp", "model")
  assert parameter_spec("gate_EDF", 3) == P("expert", "fsdp", "model")
  assert parameter_spec("out_NHD", 3) == P("model", None, "fsdp")
  assert parameter_spec("router_DE", 3) == P()
  for name, num_dims in (("gate_EDF", 2), ("gate_EDF", 5), ("novelty", 2), ("novel_DQ", 2)):
    with pytest.raises(ValueError, match=f"no rule for the parameter {name}"):
      parameter_spec(name, num_dims)


def test_the_letters_are_those_of_the_legend():
  from moe_lab import types

  assert all(f"  {letter}  " in types.__doc__ for letter in PARAMETERS)


def test_moments_are_spread_as_their_parameters_and_the_rest_is_copied():
  config = Config(model=ModelConfig(num_layers=2, num_dense_layers=1, num_shared_experts=1))
  state = jax.eval_shape(lambda: initial_state(config, make_optimizer(config.train)))
  specs = state_specs(state)
  by_name = {}
  for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, P))[0]:
    by_name.setdefault(str(getattr(path[-1], "key", path[-1])), set()).add(spec)
  assert by_name["gate_EDF"] == {P(None, "expert", "fsdp", "model")}  # of the parameter and of both moments
  assert by_name["embedding_VD"] == {P("model", "fsdp")}
  assert by_name[".load_E"] == by_name[".step"] == by_name["threshold"] == {P()}
  assert jnp.shape(state.step) == ()
