"""A checkpoint that something happened to on the disk: the numbers that were saved, an older step, or one line."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lab.errors import UserError
from moe_lab.io.checkpoint import Checkpointer


def state(step):
  return {
    "params": {"table": jax.random.normal(jax.random.key(step), (16, 8)), "half": jnp.full(5, 1 / 3, jnp.bfloat16)},
    "step": jnp.int32(step),
  }


META = {"loader": {"position": 17}, "fingerprint": "abc"}


def abstract():
  return jax.eval_shape(lambda: state(0))


def same(got, wanted):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
  return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  with Checkpointer(folder, keep=2) as saver:
    for step in (1, 2):
      saver.save(step, state(step), META)
  return folder


def flipped(path, place):
  data = bytearray(path.read_bytes())
  data[place % len(data)] ^= 1 << place % 8
  path.write_bytes(bytes(data))


DAMAGES = {
  "deleted": lambda path: path.unlink(),
  "emptied": lambda path: path.write_bytes(b""),
  "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  **{f"flipped_{n}": lambda path, n=n: flipped(path, 31 * n + 7 * n * n) for n in range(6)},
}


def test_no_damage_of_a_file_gives_a_wrong_number(whole, tmp_path):
  files = sorted(path.relative_to(whole) for path in (whole / "checkpoints" / "2").rglob("*") if path.is_file())
  assert len(files) > 5
  refused, gone_back = 0, 0
  for number, (file, damage) in enumerate(itertools.product(files, DAMAGES)):
    folder = tmp_path / str(number)
    shutil.copytree(whole, folder)
    if (folder / file).stat().st_size or damage == "deleted":
      DAMAGES[damage](folder / file)
    with Checkpointer(folder, keep=None) as reader:
      try:
        got, meta, step = reader.restore(abstract(), step=2)
        assert same(got, state(2)) and (meta, step) == (META, 2), (file, damage)
      except UserError as error:
        refused += 1
        assert "checkpoints/2 " in str(error) and "\n" not in str(error), (file, damage)
      got, meta, step = reader.restore(abstract())
      assert same(got, state(step)) and meta == META, (file, damage)
      gone_back += step == 1
    shutil.rmtree(folder)
  assert refused == gone_back > len(files)  # Orbax alone reads most flips as numbers


def test_a_run_sets_the_damaged_step_aside_and_goes_on(whole, tmp_path, caplog):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  for path in (folder / "checkpoints" / "2").rglob("d/*"):
    flipped(path, path.stat().st_size // 2)
  with Checkpointer(folder, keep=2) as saver:
    got, _, step = saver.restore(abstract())
    assert step == 1 and same(got, state(1))
    [line] = [record.getMessage() for record in caplog.records if "going back" in record.getMessage()]
    assert "checkpoints/2 cannot be read (" in line and "going back to step 1; it is kept as 2.damaged" in line
    saver.save(2, state(2), META)
  with Checkpointer(folder, keep=2) as saver:
    assert saver.steps() == [1, 2] and same(saver.restore(abstract())[0], state(2))
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]


def test_parts_that_eight_devices_held_are_looked_at_one_by_one():
  from moe_lab.io.digests import changed, digests_of

  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  [[place, digest]] = digests_of({"x": array})["['x']"].items()
  assert place == "0:4,0:6"
  halves = {
    "['x']": {"0:4,0:3": digests_of(array[:, :3])[""]["0:4,0:3"], "0:4,3:6": digests_of(array[:, 3:])[""]["0:4,0:3"]}
  }
  assert changed({"x": jnp.asarray(array)}, halves) is None
  array[2, 4] += 1
  assert changed({"x": jnp.asarray(array)}, halves) == "['x']"
  assert changed({"y": array}, halves) == "['y']"
