"""The reference system is what its file says, by arithmetic: nothing of its size is allocated."""

import math

import jax
import numpy as np

from configs.medium_50b import get_config
from moe_lab.config.resolve import resolve
from moe_lab.nn.attention import layer_slopes, layer_windows
from moe_lab.ops.blocked_attention import blocks_visited
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state

CONFIG = resolve(get_config())
MODEL = CONFIG.model


def test_parameters():
  params = jax.eval_shape(lambda: initial_state(CONFIG, make_optimizer(CONFIG.train))).params
  sizes = {
    jax.tree_util.keystr(path): math.prod(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  experts = sum(n for name, n in sizes.items() if name.endswith(("gate_EDF']", "up_EDF']", "down_EFD']")))
  attention = sum(n for name, n in sizes.items() if "attention" in name and name.endswith("H']") and "gain" not in name)
  attention += sum(n for name, n in sizes.items() if name.endswith("out_NHD']"))
  total = sum(sizes.values())
  assert experts == 32 * 32 * 3 * 4096 * 3840  # layers, experts, matrices of D x F
  assert attention == 32 * 4096 * 128 * (2 * 32 + 2 * 8)  # queries and output of 32 heads, keys and values of 8
  # Two embeddings of 65,536 tokens; routers, policies and gains are the other 5.6 M.
  assert 5e6 < total - experts - attention - 2 * 65_536 * 4096 < 6e6
  assert total == 50_202_951_968
  at_most = total - experts + experts * CONFIG.routing.k_max // MODEL.num_experts
  assert at_most == 13_964_165_408
  assert 45e9 <= total <= 60e9 and 12e9 <= at_most <= 15e9
  assert CONFIG.routing.k_max == 8 and CONFIG.routing.method == "dynamic"
  at_budget = total - experts * (1 - CONFIG.routing.budget / MODEL.num_experts)
  assert 6.4e9 < at_budget < 6.5e9


def test_attention_reaches_128k():
  assert (MODEL.num_kv_heads, MODEL.num_heads, MODEL.head_dim, CONFIG.data.seq_len) == (8, 32, 128, 131_072)
  # A group that sees everything can single out one key: its logits span 2 S, and all others weigh L e^(-2 S) to it.
  assert MODEL.qk_norm and MODEL.qk_bound >= 8 and 131_072 * math.exp(-2 * MODEL.qk_bound) < 0.015
  # 2^-x with x in the middles of seven parts of 0..8; one group has none.
  np.testing.assert_allclose(layer_slopes(MODEL), [*2.0 ** -(8 * (np.arange(7) + 0.5) / 7), 0], rtol=1e-6)
  assert layer_windows(MODEL) == (49, 110, 248, 559, 1262, 2847, 6421, None)
  # Of the blocks of keys that a windowed group would see without its window, the widest visits a ninth.
  blocks = [blocks_visited(131_072, 131_072, window, block=512) for window in layer_windows(MODEL)]
  assert blocks[-1] == 256 * 257 // 2 and blocks[6] < 0.11 * blocks[-1] and blocks[0] < 512
