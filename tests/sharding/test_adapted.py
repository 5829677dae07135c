"""Weights in 4 bits and adapters, spread over eight devices, learn what they learn on one; in a process of its own."""

import pytest

from tests.sharding import eight_devices

_CHECKS = """
import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.nn.transformer import Transformer
from moe_lab.sharding.mesh import make_mesh
from moe_lab.sharding.rules import on_devices, state_shardings
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

config = Config(
  model=ModelConfig(
    dim=32, num_layers=2, num_dense_layers=1, dense_dim=32, num_shared_experts=1, num_heads=4, num_kv_heads=2,
    head_dim=16, num_experts=4, expert_dim=32,
  ),
  routing=RoutingConfig(method="topk", k=2),
  data=DataConfig(vocab_size=32, seq_len=16),
  train=TrainConfig(steps=9, batch_size=8, warmup_steps=2, learning_rate=3e-3),
  adapt=ADAPT,
)
optimizer, rng = make_optimizer(config.train), np.random.default_rng(0)
batches = []
for _ in range(4):
  tokens = rng.integers(0, 32, (8, 17)).astype(np.int32)
  batches.append(Batch(tokens, np.ones_like(tokens), 0 * tokens))


def losses(mesh):
  begin = lambda: initial_state(config, optimizer)
  state = jax.jit(begin, out_shardings=state_shardings(jax.eval_shape(begin), mesh) if mesh else None)()
  step, found = make_train_step(config, Transformer(config, mesh), optimizer), []
  for batch in batches:
    state, metrics = step(state, on_devices(batch, mesh) if mesh else batch)
    found.append(float(metrics.loss_sum / metrics.loss_weight))
  return found


want = losses(None)
assert want[-1] != want[0]
for axes in (dict(data=4, expert=2), dict(fsdp=2, expert=2, model=2), dict(sequence=2, expert=4)):
  np.testing.assert_allclose(losses(make_mesh(MeshConfig(**axes))), want, atol=1e-4, err_msg=str(axes))
print("all equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "adapt",
  [
    'AdaptConfig(weights="int4", lora_rank=4)',
    'AdaptConfig(weights="nf4", lora_rank=4, lora_on=("attention",), router="frozen")',
    "AdaptConfig(lora_rank=4)",
  ],
)
def test_many_devices_learn_what_one_learns(adapt):
  eight_devices.run(_CHECKS.replace("ADAPT", adapt))
