"""Eight devices generate what one does; run in a process of its own, which has eight CPU devices."""

import pytest
from jax.sharding import AbstractMesh

from moe_lab.errors import UserError
from moe_lab.infer.cache import ring_sizes
from moe_lab.infer.placement import check_mesh
from moe_lab.sharding.rules import AXES
from tests.infer.models import make
from tests.sharding import eight_devices

_CHECKS = """
import jax
import numpy as np

from moe_lab.config.mesh import MeshConfig
from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from moe_lab.sharding.mesh import make_mesh
from tests.infer.models import SMALL, VOCAB, make

SMALL.update(num_experts=8, expert_dim=8)
config, params, state = make("windowed")
rng = np.random.default_rng(0)
SIZES = (1, 30, 2.0), (16, 9, 1.0), (33, 20, 4.0), (70, 12, 2.5)
requests = [Request(rng.integers(0, VOCAB, n), m, budget=b) for n, m, b in SIZES]
requests += [Request(rng.integers(0, VOCAB, 9), 20, temperature=1.0, seed=n, budget=3.0) for n in range(6)]


def responses(mesh):
  served = Engine(config, params, state, slots=8, capacity=128, chunk=16, steps=4, mesh=mesh)
  made = [[] for _ in requests]
  for index, token in served.generate(requests):
    made[index].append((token.token, token.experts, token.log_prob))
  return made, served


want, alone = responses(None)
for axes in (dict(data=2, expert=4), dict(expert=2, model=2, fsdp=2), dict(model=4, expert=2)):
  got, served = responses(make_mesh(MeshConfig(**axes)))
  for mine, theirs in zip(got, want, strict=True):
    assert [token[:1] for token in mine] == [token[:1] for token in theirs], axes
    np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-4)
  # A device's groups share their sizes with all others' along "model": never less than one device would keep.
  assert served.cache_bytes >= alone.cache_bytes
  held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(served._cache))
  assert held == served.cache_bytes // 8, axes
print("all equal")
"""


@pytest.mark.slow
def test_eight_devices_generate_what_one_does():
  eight_devices.run(_CHECKS)


def test_each_device_along_model_has_rings_as_large_as_the_widest_window():
  config = make("windowed")[0].model  # windows of 46, 319, 2210 and all, and a chunk of 16
  assert ring_sizes(config, 4096, 16) == (64, 384, 2240, 4096)
  assert ring_sizes(config, 4096, 16, shares=2) == (2240, 4096)
  assert ring_sizes(config, 4096, 16, shares=4) == (4096,)


def test_what_a_mesh_cannot_share_is_refused():
  mesh = AbstractMesh((2, 1, 4, 1, 1), AXES)
  check_mesh(mesh, 8, 4, 16)
  with pytest.raises(UserError, match="slots=6: wanted a multiple of 8"):
    check_mesh(mesh, 6, 4, 16)
  check_mesh(mesh, 8, 4, 12)  # four prompts at a time: each along "expert", its chunk along "data"
  with pytest.raises(UserError, match="chunk=12: wanted a multiple of 8"):
    check_mesh(mesh, 8, 3, 12)
  with pytest.raises(UserError, match="mesh.sequence = 2: wanted 1 where text is generated"):
    check_mesh(AbstractMesh((1, 1, 1, 2, 1), AXES), 8, 4, 16)
