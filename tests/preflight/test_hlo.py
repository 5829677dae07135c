"""Collectives of a program's text, by hand and as the compiler writes it."""

import pytest

from moe_lab.preflight.hlo import Collective, collectives
from tests.sharding import eight_devices

MESH = {"data": 2, "expert": 4}

TEXT = """
HloModule jit_step, num_partitions=8

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %g = bf16[16,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %s = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %d = bf16[8,8]{1,0} all-gather-done(%s)
  %h = (bf16[2,8], bf16[4,8]) fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %k = (bf16[2,8], bf16[4,8]) fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %y)
}

%async_collective_fusion.1 (p: bf16[2,8]) -> bf16[4,8] {
  ROOT %c = bf16[4,8] all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}, more={chain_id="3"}
}

%async_collective_fusion.2 (p: bf16[2,8]) -> bf16[4,8] {
  ROOT %c = bf16[4,8] all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}, more={chain_id="3"}
}

%condition.1 (p: (s32[], f32[4,8])) -> pred[] {
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.3 (p: f32[8,8]) -> f32[4,8] {
  %r = f32[8,8]{1,0} all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.1
  ROOT %slice = f32[4,8] dynamic-slice(%r, %k, %z), dynamic_slice_sizes={4,8}
}

ENTRY %main.9 (p: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%init), condition=%condition.1, body=%body.1
  %v = (s32[], f32[4,8]) while(%w), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[4,8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3
  %b = f32[16,8] broadcast(%z)
  %there = f32[16,8] ragged-all-to-all(%f, %b, %o, %n, %o, %n), replica_groups={{0,1,2,3},{4,5,6,7}}
  %back = f32[4,8] ragged-all-to-all(%there, %f, %o, %n, %o, %n), replica_groups={{0,1,2,3},{4,5,6,7}}
  %e = f32[4,8]{1,0} all-reduce(%f), replica_groups={}, to_apply=%add.1
  ROOT %m = f32[4,8] collective-permute(%e), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
"""


def test_by_hand():
  # The loop goes round 12 times by its condition, then 3 times by its own word.
  want = [
    Collective("all-gather", ("data",), 2, 4 * 8 * 2, 15),
    Collective("all-gather", ("data",), 2, 8 * 8 * 2, 15),
    Collective("all-gather", ("expert",), 4, 16 * 8 * 2, 15),
    Collective("all-reduce", ("data", "expert"), 8, 4 * 8 * 4, 1),
    Collective("collective-permute", ("expert",), 8, 4 * 8 * 4, 1),
    Collective("ragged-all-to-all", ("expert",), 4, 4 * 8 * 4, 2),
    Collective("reduce-scatter", ("data",), 2, 4 * 8 * 4, 1),
  ]
  assert collectives(TEXT, MESH) == want
  # A ring sends all parts but the own; summing and sharing the sum takes it twice.
  assert want[1].bytes_per_chip == 15 * 128 / 2
  assert want[3].bytes_per_chip == 2 * 128 * 7 / 8
  assert want[6].bytes_per_chip == 128


BETWEEN = """
ENTRY %main.1 (p: f32[4,8]) -> f32[4,8] {
  %s = (f32[4,8]{1,0}, u32[], token[]) send(%p, %a), channel_id=4, is_host_transfer=true, frontend_attributes={HOW}
  %r = (f32[4,8]{1,0}, u32[], token[]) recv(%a), channel_id=3, is_host_transfer=true, frontend_attributes={HOW}
}
""".replace("HOW", '_xla_megascale_target="{TARGET}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"')


@pytest.mark.parametrize("target, slices", [("1,2", 2), ("1:4", 4)])
def test_what_goes_between_slices(target, slices):
  (found,) = collectives(BETWEEN.replace("TARGET", target), MESH)
  assert found == Collective("all-reduce between slices", ("data",), slices, 128, 1)
  assert found.bytes_per_chip == 2 * 128 * (slices - 1) / slices


_CHECKS = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_lab.preflight.hlo import collectives

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))


def local(x):
  def round(x, _):
    y = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
    return y + jax.lax.psum(x, "data"), None

  x, _ = jax.lax.scan(round, x, None, length=5)
  return jax.lax.all_gather(x, "expert", axis=0, tiled=True)


run = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P(), check_vma=False)
x = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=NamedSharding(mesh, P("expert")))
text = jax.jit(run).lower(x).compile().as_text()
found = {(c.opcode, c.axes): (c.size, c.result_bytes, c.times) for c in collectives(text, dict(mesh.shape))}
assert found["all-to-all", ("expert",)][::2] == (4, 5), found
assert found["all-reduce", ("data",)] == (2, 48, 5), found
assert found["all-gather", ("expert",)] == (4, 192, 1), found
print("all equal")
"""


@pytest.mark.slow
def test_as_the_compiler_writes_it():
  eight_devices.run(_CHECKS)
