"""The table of names: worked by hand."""

import weakref

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_lab.errors import UserError
from moe_lab.interop.tensors import Row, places, read_params, tensors

ROWS = (
  Row("emb", "embedding_VD", "V D -> V D"),
  Row("block.{z}.q", "layers/attention/query_DNH", "(N H) D -> D N H"),
  Row("block.{z}.turned", "layers/attention/turned_DNH", "(N half two) D -> D N (two half)"),
  Row("block.{z}.expert.{e}", "layers/moe/up_EDF", "F D -> D F"),
  Row("block.{z}.gate", "layers/moe/shared_gate_D", "1 D -> D"),
)
SHAPES = {
  "embedding_VD": (3, 2),
  "dense_layers/attention/query_DNH": (1, 2, 2, 2),
  "moe_layers/attention/query_DNH": (2, 2, 2, 2),
  "moe_layers/moe/up_EDF": (2, 3, 2, 4),
  "moe_layers/moe/shared_gate_D": (2, 2),
}


class Memory:
  """Tensors in a dictionary."""

  where = "memory"

  def __init__(self, tensors):
    self.tensors, self.names = tensors, tuple(tensors)

  def shape(self, name):
    return self.tensors[name].shape

  def read(self, name):
    return self.tensors[name]


def written():
  """Returns parameters and their tensors."""
  rng = np.random.default_rng(0)
  params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
  return params, {place.name: tensor for place, tensor in tensors(ROWS, params)}


def test_every_tensor_has_its_name_and_shape():
  shapes = {place.name: place.shape for place in places(ROWS, SHAPES)}
  assert shapes == {
    "emb": (3, 2),
    # The dense layer is the first; the layers with experts go on counting.
    "block.0.q": (4, 2), "block.1.q": (4, 2), "block.2.q": (4, 2),
    **{f"block.{z}.expert.{e}": (4, 2) for z in (1, 2) for e in (0, 1, 2)},
    "block.1.gate": (1, 2), "block.2.gate": (1, 2),
  }  # fmt: skip


def test_a_tensor_is_the_part_that_the_rule_says():
  params, found = written()
  # Output n * H + h of input d is query[d, n, h].
  np.testing.assert_array_equal(found["block.1.q"][1 * 2 + 0], params["moe_layers/attention/query_DNH"][0, :, 1, 0])
  np.testing.assert_array_equal(found["block.2.expert.1"], params["moe_layers/moe/up_EDF"][1, 1].T)


def test_halves_that_were_interleaved_are_taken_apart():
  # One head of width 4: rows a b c d are the pairs (a, b) and (c, d); as halves they are a c | b d.
  shapes = {"moe_layers/attention/turned_DNH": (1, 1, 1, 4)}
  params = read_params(ROWS, shapes, Memory({"block.0.turned": np.array([[1.0], [2.0], [3.0], [4.0]])}))
  assert params["moe_layers/attention/turned_DNH"].ravel().tolist() == [1, 3, 2, 4]


def test_there_and_back_is_the_same():
  params, found = written()
  again = read_params(ROWS, SHAPES, Memory(found))
  for path, param in params.items():
    np.testing.assert_array_equal(again[path], param)


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda found: found.pop("block.2.expert.1"), "memory has no tensor block.2.expert.1, which the model needs"),
    (lambda found: [found.pop(f"block.{z}.q") for z in (0, 1)], r"no tensor block.0.q \(and 1 more\)"),
    (lambda found: found.update(more=np.zeros(1)), "memory has a tensor more, for which the model has no place"),
    (lambda found: found.update(emb=np.zeros((2, 3))), r"memory: emb is \[2, 3\]: wanted \[3, 2\]"),
  ],
)
def test_what_is_missed_left_over_or_of_another_shape_is_a_line(change, words):
  _, found = written()
  change(found)
  with pytest.raises(UserError, match=words):
    read_params(ROWS, SHAPES, Memory(found))


def test_a_needless_tensor_is_left_alone():
  params, found = written()
  again = read_params(ROWS, SHAPES, Memory(found | {"old.3": np.zeros(5)}), needless=r"old\.\d")
  assert again.keys() == params.keys()


def test_a_parameter_without_a_name_is_a_line():
  with pytest.raises(UserError, match="moe_layers/moe/router_DE has no name"):
    places(ROWS, SHAPES | {"moe_layers/moe/router_DE": (2, 2, 3)})


def test_flattened_and_built_again():
  tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
  flat = flatten_dict(tree, sep="/")
  assert flat == {"a": 1, "b/c": 2, "b/d/e": 3} and unflatten_dict(flat, sep="/") == tree


def test_one_tensor_at_a_time_is_in_memory():
  class Counting(Memory):
    alive = []

    def read(self, name):
      assert not any(other() is not None for other in self.alive), "the one before is still there"
      tensor = self.tensors[name].copy()
      self.alive.append(weakref.ref(tensor))
      return tensor

  _, found = written()
  read_params(ROWS, SHAPES, Counting(found))
  assert len(Counting.alive) == len(found)
