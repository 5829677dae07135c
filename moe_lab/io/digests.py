"""SHA-256 of a state's arrays, so that a checkpoint that has changed on the disk is never taken for the state.

The arrays are hashed before they are written, in the parts that devices hold. Whoever restores them, on another number
of devices too, hashes the same parts of what was read.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from moe_lab.io import hosts
from moe_lab.io.files import dump_json

Digests = dict[str, dict[str, str]]  # leaf -> "0:4,0:8", the part's place -> SHA-256 in hexadecimal


def digest_of(value: object) -> str:
  """Returns the SHA-256 of a value of JSON's types; the order of keys does not matter."""
  plain = json.loads(dump_json(value))
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def digests_of(tree: object) -> Digests:
  """Returns the digests of all parts, on all processes; called at the same point by each."""
  found: Digests = {}
  parts = [(name, place, part) for name, leaf in _leaves(tree) for place, part in _parts(leaf)]
  with ThreadPoolExecutor() as pool:  # hashing lets other threads run
    for (name, place, _), digest in zip(parts, pool.map(_digest, (part for *_, part in parts)), strict=True):
      found.setdefault(name, {})[place] = digest
  merged: Digests = {}
  for text in hosts.from_all(json.dumps(found)):
    for name, digests in json.loads(text).items():
      merged.setdefault(name, {}).update(digests)
  return merged


def changed(tree: object, digests: Digests) -> str | None:
  """Returns the name of a leaf that is not what was hashed; None: all is as it was.

  With several processes each looks at the parts that it holds whole.
  """
  checks = [
    (name, part, digest)
    for name, leaf in _leaves(tree)
    for place, digest in digests.get(name, {"": ""}).items()
    if (part := _held(leaf, place)) is not None
  ]
  with ThreadPoolExecutor() as pool:
    for (name, _, digest), found in zip(checks, pool.map(_digest, (part for _, part, _ in checks)), strict=True):
      if found != digest:
        return name
  return None


def _leaves(tree: object) -> Iterator[tuple[str, jax.Array]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    yield jax.tree_util.keystr(path), jax.random.key_data(leaf) if is_key else leaf


def _parts(leaf: object) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the place and the numbers of the parts that this process is to hash."""
  if not isinstance(leaf, jax.Array):
    yield _place((slice(None),) * np.ndim(leaf), np.shape(leaf)), np.asarray(leaf)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield _place(shard.index, leaf.shape), np.asarray(shard.data)


def _held(leaf: object, place: str) -> np.ndarray | None:
  """Returns the part of an array at a place; None if this process does not hold it whole."""
  bounds = [tuple(map(int, text.split(":"))) for text in place.split(",") if text]
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return np.asarray(leaf)[tuple(slice(*pair) for pair in bounds)]
  for shard in leaf.addressable_shards:
    starts = [part.indices(size)[0] for part, size in zip(shard.index, leaf.shape, strict=True)]
    inner = [(low - start, high - start) for (low, high), start in zip(bounds, starts, strict=True)]
    if all(0 <= low and high <= size for (low, high), size in zip(inner, shard.data.shape, strict=True)):
      return np.asarray(shard.data)[tuple(slice(*pair) for pair in inner)]
  return None


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  return ",".join("{}:{}".format(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def _digest(part: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(part).reshape(-1).view(np.uint8)).hexdigest()
