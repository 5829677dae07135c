import gc
import shutil
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from moe_lab.errors import RunError, UserError
from moe_lab.io import checkpoint
from moe_lab.io.checkpoint import Checkpointer, saved_steps


class Controller(NamedTuple):
  price: jax.Array
  history: tuple


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: object
  controller: Controller
  key: jax.Array


def make_state(seed=0, dim=3, dtype=jnp.bfloat16):
  params = {
    "embed": {"table": jax.random.normal(jax.random.key(seed), (4, dim)), "half": jnp.full((dim,), 1 / 3, dtype)}
  }
  params["odd"] = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32)
  return State(
    jnp.int32(seed),
    params,
    optax.adamw(1e-3).init(params),
    Controller(jnp.float32(-0.1), (jnp.arange(3, dtype=jnp.uint8), None)),
    jax.random.key(7),
  )


def abstract(state):
  return jax.eval_shape(lambda: state)


def raw(leaf):
  leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  assert list(map(raw, jax.tree.leaves(got))) == list(map(raw, jax.tree.leaves(wanted)))


def test_round_trip_is_bitwise(tmp_path):
  state = make_state(1)
  with Checkpointer(tmp_path, keep=2) as saver:
    saver.save(5, state, {"loader": {"position": 17}, "nan": float("nan")})
  for keep in (None, 2):
    with Checkpointer(tmp_path, keep=keep) as reader:
      got, meta, step = reader.restore(abstract(state))
      assert (meta, step) == ({"loader": {"position": 17}, "nan": None}, 5)
      assert isinstance(got, State) and isinstance(got.controller, Controller)
      assert_same(got, state)


def test_keeps_the_newest_and_restores_what_is_asked(tmp_path):
  with Checkpointer(tmp_path, keep=2) as saver:
    for step in (1, 2, 3):
      saver.save(step, make_state(step), {"at": step})
    saver.wait()
    assert (saver.steps(), saver.latest_step()) == ([2, 3], 3)
    got, meta, step = saver.restore(abstract(make_state()), step=2)
    assert (meta, step) == ({"at": 2}, 2)
    assert_same(got, make_state(2))
    with pytest.raises(UserError, match="no checkpoint of step 1 under .*: it has 2, 3"):
      saver.restore(abstract(make_state()), step=1)


def test_state_may_be_donated_right_after_save(tmp_path):
  step_fn = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = {"x": jnp.zeros((1 << 20,))}
  with Checkpointer(tmp_path, keep=9) as saver:
    for step in range(4):
      saver.save(step, state, {})
      for _ in range(5):
        state = jax.tree.map(step_fn, state)
    saver.wait()
    for step in range(4):
      got, _, _ = saver.restore(abstract(state), step=step)
      np.testing.assert_array_equal(got["x"], np.full((1 << 20,), 5.0 * step))


def test_saving_again(tmp_path):
  state = make_state(1)
  with Checkpointer(tmp_path, keep=3) as saver:
    saver.save(2, state, {"at": "first"})
    saver.save(2, state, {"at": "again"})  # the last step of a run may also be a periodic one
    saver.save(4, state, {"at": "first"})
  with Checkpointer(tmp_path, keep=3) as saver:
    # Going on from step 2 abandons step 4, and comes by it again.
    _, meta, _ = saver.restore(abstract(state), step=2)
    assert meta == {"at": "first"}
    saver.save(3, make_state(3), {})
    saver.save(4, make_state(4), {"at": "second"})
    saver.wait()
    got, meta, step = saver.restore(abstract(state))
    assert (meta, step, saver.steps()) == ({"at": "second"}, 4, [2, 3, 4])
    assert_same(got, make_state(4))


def test_an_abandoned_continuation_goes_once_the_new_one_is_saved(tmp_path):
  with Checkpointer(tmp_path, keep=2) as saver:
    for step in (2, 4):
      saver.save(step, make_state(step), {})
  with Checkpointer(tmp_path, keep=2) as saver:
    saver.restore(abstract(make_state()), step=2)
    assert saver.steps() == [2, 4]
    saver.save(3, make_state(3), {})
    saver.wait()
    # Step 4 would be resumed from in place of 3.
    assert saver.steps() == [2, 3]


def test_a_removal_that_was_killed_leaves_no_half_step(tmp_path, monkeypatch):
  with Checkpointer(tmp_path, keep=1) as saver:
    saver.save(1, make_state(), {})
    saver.wait()
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # killed here
    saver.save(2, make_state(), {})
  monkeypatch.undo()
  assert saved_steps(tmp_path) == [2]
  assert len(list((tmp_path / "checkpoints").iterdir())) == 2
  with Checkpointer(tmp_path, keep=1) as saver:
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert saver.restore(abstract(make_state()))[2] == 2


@pytest.mark.fault("another tokenizer, dtype or shape")
def test_another_dtype_shape_or_leaf_is_refused(tmp_path):
  state = make_state()
  with Checkpointer(tmp_path, keep=1) as saver:
    saver.save(1, state, {})
    saver.wait()

    def refuse(match, wanted):
      with pytest.raises(UserError, match=match) as caught:
        saver.restore(abstract(wanted))
      assert "\n" not in str(caught.value)

    refuse(r"has bfloat16\[3\] for \.params\['embed'\]\['half'\].*wants float32\[3\]", make_state(dtype=jnp.float32))
    refuse(
      r"has float32\[4, 3\] for \.params.*'table'.*wants float32\[4, 5\]",
      state.replace(params={**state.params, "embed": {**state.params["embed"], "table": jnp.zeros((4, 5))}}),
    )
    refuse(
      r"has nothing for \.params\['new'\].*wants int32\[\]", state.replace(params={**state.params, "new": jnp.int32(0)})
    )
    refuse(
      r"has float32\[4\] for \.params\['odd'\].*wants nothing", state.replace(params={"embed": state.params["embed"]})
    )


def test_nothing_to_restore(tmp_path):
  for keep in (None, 1):
    with Checkpointer(tmp_path, keep=keep) as reader:
      assert reader.latest_step() is None
      with pytest.raises(UserError, match="no checkpoint under .*: train it first"):
        reader.restore({})
    assert (tmp_path / "checkpoints").exists() == (keep is not None)


@pytest.mark.fault("empty step directory, killed save")
def test_what_a_killed_save_left(tmp_path, caplog):
  with Checkpointer(tmp_path, keep=2) as saver:
    saver.save(1, make_state(), {})
  folder = tmp_path / "checkpoints"
  (folder / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  (folder / "3").mkdir()
  with Checkpointer(tmp_path, keep=None) as reader:
    assert reader.restore(abstract(make_state()))[2] == 1
  # The temporary directory may be a save in progress: a reader leaves it.
  assert (folder / "2.orbax-checkpoint-tmp").exists() and (folder / "3").exists()
  caplog.clear()
  with Checkpointer(tmp_path, keep=2) as saver:
    assert saver.steps() == [1]
    assert "empty checkpoint" in caplog.text
    assert [p.name for p in folder.iterdir()] == ["1"]
    saver.save(3, make_state(), {})
  assert saved_steps(tmp_path) == [1, 3]


def test_a_damaged_checkpoint_is_one_line(tmp_path):
  state = {"x": jnp.arange(10_000)}
  with Checkpointer(tmp_path, keep=2) as saver:
    saver.save(1, state, {})
    saver.save(2, state, {})
  for path in (tmp_path / "checkpoints" / "2" / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:10])
  with Checkpointer(tmp_path, keep=None) as reader:
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read .*step 1") as caught:
      reader.restore(abstract(state), step=2)
    assert "\n" not in str(caught.value) and 'Error reading "x/' in str(caught.value)
    assert reader.restore(abstract(state))[2] == 1


READ = """
async def read():
  try:
    await never
  except BaseException as error:
    raise ValueError("read half way") from error
"""


@pytest.mark.parametrize("file, told", [("/lib/orbax/checkpoint/_src/x.py", 0), ("/lib/other.py", 1)])
def test_reads_that_orbax_abandons_say_nothing(monkeypatch, file, told):
  class Never:
    def __await__(self):
      yield

  heard, names = [], {"never": Never()}
  exec(compile(READ, file, "exec"), names)
  monkeypatch.setattr(checkpoint, "_hook_before", heard.append)
  monkeypatch.setattr(sys, "unraisablehook", checkpoint._ignore_abandoned_reads)
  reading = names["read"]()
  reading.send(None)
  del reading
  gc.collect()
  assert len(heard) == told


@pytest.mark.fault("a save in the background fails")
def test_a_failed_save_names_the_last_good_step(tmp_path):
  saver = Checkpointer(tmp_path, keep=2)
  saver.save(1, make_state(), {})
  saver.wait()
  folder = tmp_path / "checkpoints"
  moved = folder.rename(tmp_path / "moved")
  folder.write_text("in the way")
  with pytest.raises(RunError, match=r"saving step 2 .* failed .*no good step") as caught:
    saver.save(2, make_state(), {})
    saver.wait()
  assert "\n" not in str(caught.value) and caught.value.exit_code == 1
  saver.close()  # what has been reported is not raised again
  folder.unlink()
  shutil.move(moved, folder)
  assert saved_steps(tmp_path) == [1]
