"""The search for L x L arrays sees them where they are."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu_long_context import arrays, compile_for, squares
from configs.medium_50b import get_config
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.resolve import resolve
from moe_lab.ops.attention import attention


def test_squares_by_hand():
  text = "  %a = (f32[1,8,4096,128]{3,2,1,0:T(8,128)}, s32[], bf16[4096,4096]) custom-call(pred[2,4096,5000] %b), u8[7]"
  assert arrays(text) == {(1, 8, 4096, 128), (4096, 4096), (2, 4096, 5000), (7,)}
  assert squares(arrays(text), 4096, 4096) == [(2, 4096, 5000), (4096, 4096)]
  assert squares(arrays(text), 128, 4096) == [(1, 8, 4096, 128), (2, 4096, 5000), (4096, 4096)]
  assert squares(arrays(text), 64, 5000) == []


@pytest.mark.parametrize("backend, found", [("reference", True), ("blocked", False)])
def test_the_search_sees_a_matrix_of_logits(backend, found):
  q, segment_BL = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, 1024), jnp.int32)

  def loss(q, segment_BL):
    return attention(q, q, q, jnp.zeros(1), segment_BL, segment_BL, backend=backend).sum()

  text = jax.jit(jax.grad(loss)).lower(q, segment_BL).compile().as_text()
  assert bool(squares(arrays(text), 1024, 1024)) == found


@pytest.mark.slow
def test_one_layers_attention_at_128k_fits_a_chip():
  pytest.importorskip("libtpu")
  result = compile_for("attention", "v5e:2x2", MeshConfig(data=1), resolve(get_config()))
  assert result["length"] == 131_072 and result["squares"] == []
  assert result["peak_bytes"] < 8 * 2**30  # of 16 GiB; one head's logits alone would be 32 GiB in bfloat16


@pytest.mark.slow
def test_a_small_model_of_its_kind_on_four_chips():
  pytest.importorskip("libtpu")
  config = resolve(get_config())
  model = dataclasses.replace(
    config.model, dim=512, num_layers=2, num_heads=8, head_dim=64, num_experts=8, expert_dim=256
  )
  small = dataclasses.replace(
    config,
    model=model,
    routing=dataclasses.replace(config.routing, expert_dropout=0.0),  # which would leave fewer than k_max of 8
    data=dataclasses.replace(config.data, vocab_size=1024, seq_len=8192),
  )
  assert compile_for("model", "v5p:2x2x1", MeshConfig(data=2, expert=2), small)["squares"] == []
