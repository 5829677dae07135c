"""Weights in 4 bits: worked codes, the error of random ones, and the products of sorted rows that read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.ops import quantised, tpu_quantised
from moe_lab.ops.grouped_mlp import ExpertWeights, grouped_mlp, quantised_dot, unpacked_dot
from moe_lab.ops.quantised import bits, dequantise, quantise
from moe_lab.ops.tiled_experts import tiled_experts
from moe_lab.ops.tpu_quantised import tpu_quantised_dot
from moe_lab.routing.base import Assignment
from moe_lab.routing.dispatch import dispatch

# Compiled once for all cases of a shape.
kernel_dot = jax.jit(functools.partial(tpu_quantised_dot, interpret=True))
plain_dot = jax.jit(unpacked_dot)

EXPERTS, DIM, HIDDEN = 4, 40, 24  # groups of 16 reach beyond both
GROUPS = {
  "all_rows_used": [8, 4, 4, 4],
  "empty_groups": [0, 8, 0, 12],
  "all_on_one": [0, 0, 20, 0],
  "unused_rows": [4, 0, 5, 0],
  "nothing": [0, 0, 0, 0],
}


def test_integers_are_kept_exactly():
  # The scale is 1/8, which float8 holds; -8 is there, so the group's largest weight takes the longer side.
  w = np.float32([[-8, 7, 0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, -7]]) / 8
  q = quantise(jnp.asarray(w), "int4", -1)
  np.testing.assert_array_equal(dequantise(q), w)
  # Code = value + 8; byte j has code j low and code j + 8 high: 0 | 5 << 4 for -8 and -3.
  assert q.codes[0, 0] == 0 | 5 << 4 and q.codes[0, 7] == 11 | 1 << 4
  assert float(q.scale[0, 0]) * quantised.UNIT == 0.125


@pytest.mark.parametrize("sign", [1, -1])
def test_the_quantiles_of_nf4_are_kept_exactly(sign):
  w = sign * quantised.BOOKS["nf4"][None] * np.float32(2.0**-5)
  np.testing.assert_allclose(dequantise(quantise(jnp.asarray(w), "nf4", -1)), w, rtol=1e-6)


def test_nf4_has_the_quantiles_of_the_paper():
  # arXiv 2305.14314, appendix E: 16 values from -1 to 1, zero among them, eight of them positive with the end.
  book = quantised.BOOKS["nf4"] / 8
  assert book[0] == -1 and book[15] == 1 and book[7] == 0 and np.all(np.diff(book) > 0)
  np.testing.assert_allclose(book[[1, 6, 8, 14]], [-0.6962, -0.0911, 0.0796, 0.7230], atol=1e-4)


@pytest.mark.parametrize("book", quantised.BOOKS)
@pytest.mark.parametrize(("shape", "axis"), [((64, 5), -2), ((3, 40, 6), -2), ((50, 2, 3), -3), ((2, 7, 9), -2)])
def test_random_weights(book, shape, axis):
  w = jax.random.normal(jax.random.key(0), shape) * 0.05
  q = quantise(w, book, axis)
  got = dequantise(q)
  assert got.shape == shape and got.dtype == jnp.float32
  # Rounding to sixteen values over about 2 x 1.8 deviations leaves well under a hundredth of the variance.
  assert float(jnp.square(got - w).mean() / jnp.square(w).mean()) < 0.008
  groups = -(-shape[axis] // 16)
  assert bits(q) == 8 * 9 * groups * w.size // shape[axis]


def test_whole_groups_take_four_and_a_half_bits():
  q = quantise(jnp.ones((64, 32)), "nf4", -2)
  assert bits(q) == 4.5 * 64 * 32


def test_zeros_stay_zeros_and_one_large_weight_does_not_spoil_other_groups():
  w = jnp.zeros((48, 2)).at[20, 0].set(3.0)
  for book in quantised.BOOKS:
    np.testing.assert_allclose(dequantise(quantise(w, book, -2)), w, rtol=0.05)


@pytest.mark.parametrize("book", quantised.BOOKS)
def test_what_inputs_weigh_is_kept_better(book):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
  importance = jnp.asarray(np.where(rng.random((64, 1)) < 0.2, 100.0, 0.1), jnp.float32)

  def error(q):
    return float((importance * jnp.square(dequantise(q) - w)).sum())

  assert error(quantise(w, book, -2, importance)) < 0.8 * error(quantise(w, book, -2))


def random_case(name, book, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(1), 5)
  shapes = ((EXPERTS, DIM, HIDDEN), (EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN, DIM))
  plain = [0.2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
  weights = ExpertWeights(*(quantise(w, book, -2) for w in plain))
  x_RD, dy_RD = (jax.random.normal(key, (20, DIM)).astype(dtype) for key in keys[3:])
  return x_RD, weights, jnp.asarray(GROUPS[name], jnp.int32), dy_RD, sum(GROUPS[name])


def unpacked_weights(weights, dtype=jnp.float32):
  return ExpertWeights(*(dequantise(q).astype(dtype) for q in weights))


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradient(backend, x_RD, weights, groups_E, dy_RD, used):
  mask_R1 = (jnp.arange(20) < used)[:, None]
  y, backward = jax.vjp(lambda x: grouped_mlp(x, weights, groups_E, backend=backend) * mask_R1, x_RD)
  return y, backward(dy_RD)[0]


@pytest.mark.parametrize("book", quantised.BOOKS)
@pytest.mark.parametrize("name", GROUPS)
def test_experts_in_4_bits_equal_the_unpacked_ones(name, book):
  x_RD, weights, *rest = random_case(name, book)
  used = rest[-1]
  want = values_and_gradient("reference", x_RD, unpacked_weights(weights), *rest)
  got = values_and_gradient("ragged_dot", x_RD, weights, *rest)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a[:used], b[:used], atol=2e-5)
  np.testing.assert_allclose(values_and_gradient("reference", x_RD, weights, *rest)[0], want[0], atol=1e-6)


def test_kernels_of_a_library_get_them_unpacked(monkeypatch):
  def by_xla(x, y, group_sizes_E, contracted, groups):
    dims = jax.lax.RaggedDotDimensionNumbers((((contracted[0],), (contracted[1],)), ((), ())), (0,), groups)
    return jax.lax.ragged_dot_general(x, y, group_sizes_E, dims, preferred_element_type=jnp.float32)

  monkeypatch.setattr("moe_lab.ops.grouped_mlp._tokamax", by_xla)
  x_RD, weights, *rest = random_case("unused_rows", "nf4")
  got = values_and_gradient("tokamax", x_RD, weights, *rest)
  want = values_and_gradient("reference", x_RD, unpacked_weights(weights), *rest)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a[:9], b[:9], atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("book", quantised.BOOKS)
@pytest.mark.parametrize("name", GROUPS)
def test_the_kernel_equals_unpacking(name, book, dtype):
  x_RD, weights, groups_E, _, used = random_case(name, book, dtype)
  for q in (weights.gate_EDF, weights.down_EFD):
    x = x_RD[:, : q.size]
    got, want = kernel_dot(x, q, groups_E), plain_dot(x, q, groups_E)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[:used], want[:used], atol=1e-5 if dtype == jnp.float32 else 0.02)


def test_the_kernel_in_several_blocks_and_tiles(monkeypatch):
  monkeypatch.setattr(tpu_quantised, "DEPTH", 32)
  monkeypatch.setattr(tpu_quantised, "WIDTH", 128)
  monkeypatch.setattr(tpu_quantised, "ROWS", 8)
  q = quantise(jax.random.normal(jax.random.key(0), (3, 96, 256)), "int4", -2)
  x_RD = jax.random.normal(jax.random.key(1), (50, 96))
  groups_E = jnp.asarray([17, 0, 30])
  got = tpu_quantised_dot(x_RD, q, groups_E, interpret=True)
  np.testing.assert_allclose(got[:47], unpacked_dot(x_RD, q, groups_E)[:47], atol=2e-4)


def test_scales_of_every_size_are_read_alike():
  byte = jnp.asarray([b for b in range(256) if b & 127 != 127], jnp.uint8)  # 127 is what float8 has for NaN
  want = jax.lax.bitcast_convert_type(byte, quantised.SCALE_TYPE).astype(jnp.float32) * quantised.UNIT
  np.testing.assert_array_equal(tpu_quantised._scale(byte.astype(jnp.int32)), want)


@pytest.mark.parametrize("experts", ["native", "tiles", "ragged_dot", "reference"])
@pytest.mark.parametrize("load", ["mixed", "all_on_one", "nobody"])
def test_dispatch_reads_them_in_every_way(experts, load):
  weights = random_case("nothing", "nf4")[1]
  tokens, slots = 13, 3
  rng = np.random.default_rng(2)
  x_TD, dy_TD = (jnp.asarray(rng.normal(size=(tokens, DIM)), jnp.float32) for _ in range(2))
  expert_TK = np.stack([rng.permutation(EXPERTS)[:slots] for _ in range(tokens)]).astype(np.int32)
  valid_TK = np.arange(slots) < rng.integers(1, slots + 1, tokens)[:, None]
  if load == "all_on_one":
    expert_TK[:, 0], valid_TK = 2, np.arange(slots) < np.ones((tokens, 1))
  if load == "nobody":
    valid_TK = np.zeros_like(valid_TK)
  gate_TK = jnp.where(valid_TK, jnp.asarray(rng.random((tokens, slots)), jnp.float32), 0)

  def values_and_gradients(weights, **way):
    def run(x_TD, gate_TK):
      return dispatch(x_TD, Assignment(jnp.asarray(expert_TK), gate_TK, jnp.asarray(valid_TK)), weights, **way)[0]

    y, backward = jax.vjp(run, x_TD, gate_TK)
    return y, *backward(dy_TD)

  want = values_and_gradients(unpacked_weights(weights), backend="dense")
  got = jax.jit(functools.partial(values_and_gradients, backend="ragged", experts=experts))(weights)
  for a, b in zip(got, want, strict=True):
    a, b = (np.where(valid_TK, x, 0) if x.shape == valid_TK.shape else x for x in (a, b))
    np.testing.assert_allclose(a, b, atol=5e-5)
  np.testing.assert_allclose(values_and_gradients(weights, backend="dense")[0], want[0], atol=1e-6)


def test_tiles_unpack_only_the_experts_that_have_rows():
  text = str(jax.make_jaxpr(functools.partial(tiled_experts, tiles=(8,)))(
    jnp.ones((6, DIM)), random_case("nothing", "int4")[1], jnp.ones(6), jnp.arange(6), jnp.asarray([6, 0, 0, 0])
  ))  # fmt: skip
  assert f"f32[{EXPERTS},{DIM}" not in text and f"f32[{DIM},{HIDDEN}]" in text


@pytest.mark.slow
@pytest.mark.parametrize("book", quantised.BOOKS)
@pytest.mark.parametrize("rows", [16, 2048])
def test_the_kernel_compiles_for_a_chip(book, rows):
  pytest.importorskip("libtpu")
  from jax.sharding import SingleDeviceSharding

  from moe_lab.preflight.topology import topology_devices

  here = SingleDeviceSharding(topology_devices("v5e:2x2")[0])
  shapes = jax.eval_shape(lambda: quantise(jnp.zeros((8, 1024, 1536)), book, -2))
  arguments = (jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16), shapes, jax.ShapeDtypeStruct((8,), jnp.int32))
  arguments = jax.tree.map(lambda leaf: leaf.update(sharding=here), arguments)
  text = jax.jit(quantised_dot).lower(*arguments).compile().as_text()
  assert "tpu_custom_call" in text
  # No array as large as the unpacked matrices.
  assert "8,1024,1536" not in text.replace("u8[8,512,1536]", "")
