"""Training on eight devices is training on one: loss, gradients, and twenty steps.

In a process of its own, or in two of four devices each.
"""

import pytest

from tests import two_processes
from tests.sharding import eight_devices

_CHECKS = """
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moe_lab.config.mesh import MeshConfig
from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.hosts import from_first
from moe_lab.nn.transformer import Transformer
from moe_lab.sharding.mesh import make_mesh
from moe_lab.sharding.rules import on_devices, state_shardings
from moe_lab.train.losses import compute_loss
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch

config = Config(
  model=ModelConfig(
    dim=16, num_layers=2, num_dense_layers=1, dense_dim=24, num_shared_experts=1, num_heads=4, num_kv_heads=2,
    head_dim=8, num_experts=8, expert_dim=8,
  ),
  routing=RoutingConfig(method="topk", k=3, expert_dropout=0.1),
  data=DataConfig(vocab_size=32, seq_len=16),
  train=TrainConfig(steps=20, batch_size=8, accumulate=ACCUMULATE, warmup_steps=4, learning_rate=3e-3),
)
optimizer = make_optimizer(config.train)
rng = np.random.default_rng(0)
batches = []
for _ in range(20):
  tokens = rng.integers(0, 32, (8, 17)).astype(np.int32)
  batches.append(Batch(tokens, np.sort(rng.integers(1, 3, tokens.shape), axis=1).astype(np.int32), 0 * tokens))


def start(mesh):
  begin = lambda: initial_state(config, optimizer)
  return jax.jit(begin, out_shardings=state_shardings(jax.eval_shape(begin), mesh) if mesh else None)()


def first_step(mesh):
  model = Transformer(config, mesh)

  @jax.jit
  def run(state, batch):
    def loss(params):
      return compute_loss(params, state, batch, jax.random.key(1), config, model)

    return jax.value_and_grad(loss, has_aux=True)(state.params)

  batch = on_devices(batches[0], mesh) if mesh else batches[0]
  (loss, _), gradient = run(start(mesh), batch)
  return loss, gradient


def trained(mesh, state, batches):
  step, losses = make_train_step(config, Transformer(config, mesh), optimizer), []
  for batch in batches:
    state, metrics = step(state, on_devices(batch, mesh) if mesh else batch)
    losses.append(float(metrics.loss_sum / metrics.loss_weight))
  return state, losses


furthest = 0.0
want_first, (want_state, want_losses) = first_step(None), trained(None, start(None), batches)
for axes in MESHES:
  mesh = make_mesh(MeshConfig(**axes))
  if config.train.accumulate == 1:
    first = multihost_utils.process_allgather(first_step(mesh), tiled=True)
    for got, want in zip(jax.tree.leaves(first), jax.tree.leaves(want_first), strict=True):
      furthest = max(furthest, np.abs(got - want).max())
      np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(axes))
  state, losses = trained(mesh, start(mesh), batches)
  np.testing.assert_allclose(losses, want_losses, atol=1e-4, err_msg=str(axes))
  off = np.abs(np.subtract(losses, want_losses)).max()
  print(axes, "first step within", furthest, "20 losses within", off, file=sys.stderr)
  gate = state.params["moe_layers"]["moe"]["gate_EDF"]
  assert gate.sharding.is_equivalent_to(state_shardings(state, mesh).params["moe_layers"]["moe"]["gate_EDF"], 4)

# Saved by eight devices, restored by eight, and where one process has them all by four and by one.
with tempfile.TemporaryDirectory() as own:
  folder = from_first(lambda: own)
  with Checkpointer(Path(folder), 1) as checkpointer:
    checkpointer.save(20, state, {})
    checkpointer.wait()
    losses = []
    fewer = ((dict(fsdp=2, expert=2), 4), ({}, 1)) if jax.process_count() == 1 else ()
    for axes, devices in ((axes, 8), *fewer):
      mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
      abstract = jax.eval_shape(lambda: initial_state(config, optimizer))
      abstract = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, state_shardings(abstract, mesh))
      if devices == 1:  # as `load_model` asks for it
        abstract = jax.eval_shape(lambda: initial_state(config, optimizer))
      restored, _, _ = checkpointer.restore(abstract)
      same = multihost_utils.process_allgather((restored, state), tiled=True) if devices == 8 else ((), ())
      jax.tree.map(np.testing.assert_array_equal, *same)
      assert devices > 1 or len(restored.params["embedding_VD"].sharding.device_set) == 1
      losses += trained(mesh, restored, batches[:1])[1]
    np.testing.assert_allclose(losses, losses[0], atol=1e-5)
print("all equal")
"""

MESHES = (
  (dict(expert=8), dict(data=2, expert=4)),
  (dict(fsdp=8), dict(model=2, expert=4)),
  (dict(sequence=2, fsdp=2, expert=2), dict(expert=2, sequence=2, model=2)),
)


FEW = (dict(fsdp=2, expert=4),)  # two sequences at a time: one for each half of the devices, which share it


@pytest.mark.slow
@pytest.mark.parametrize("accumulate, meshes", [(1, m) for m in MESHES] + [(2, MESHES[0][1:]), (4, FEW)])
def test_many_devices_learn_what_one_learns(accumulate, meshes):
  eight_devices.run(f"ACCUMULATE, MESHES = {accumulate}, {meshes!r}\n" + _CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [MESHES[0], MESHES[2]])
def test_two_processes_learn_what_one_device_learns(meshes):
  two_processes.run(f"ACCUMULATE, MESHES = 1, {meshes!r}\n" + _CHECKS)
