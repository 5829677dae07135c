"""Mutated checkpoints of somebody else's, and adapters: one line or right tensors, in no more memory than is there."""

import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import strategies as st

from moe_lab.interop.gguf import Gguf
from moe_lab.interop.hf.config import to_config
from moe_lab.interop.hf.files import INDEX, WHOLE, Safetensors
from moe_lab.io.arrays import read_npz
from moe_lab.train.adapter import read_adapter
from tests.fuzz.fuzzing import VALUES, answered, each, examples, mutated

ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}
MOST = 8 << 20  # bytes that reading a file of a few hundred may take: the libraries' own, which never depend on a claim


def bounded(read):
  """Returns what `read` returns, if it took little memory."""
  tracemalloc.start()
  try:
    return read()
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST, peak


def read_all(reader) -> dict:
  found = {}
  for name in reader.names:
    found[name] = reader.read(name)
    assert found[name].shape == reader.shape(name)
  return found


@examples(100, 2000)
def test_safetensors(tmp_path, count):
  numpy = pytest.importorskip("safetensors.numpy")
  path = tmp_path / WHOLE
  numpy.save_file(ARRAYS, path)
  valid = path.read_bytes()
  size = int.from_bytes(valid[:8], "little")
  header = json.loads(valid[8 : 8 + size])

  def shaped(field, value):
    text = json.dumps(header | {"a": header["a"] | {field: value}}).encode()
    return len(text).to_bytes(8, "little") + text + valid[8 + size :]

  lists = st.lists(st.integers(0, 2**64), max_size=3)
  fields = st.builds(shaped, st.sampled_from(["shape", "data_offsets", "dtype"]), lists | VALUES)
  sizes = st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + valid[8:])

  def check(data):
    path.write_bytes(data)
    with answered(str(tmp_path)):
      for array in bounded(lambda: read_all(Safetensors(tmp_path))).values():
        assert array.nbytes <= len(data)

  check(valid)
  np.testing.assert_array_equal(read_all(Safetensors(tmp_path))["a"], ARRAYS["a"])
  each(mutated([valid]) | fields | sizes, count, check)


@examples(100, 2000)
def test_an_index_of_shards(tmp_path, count):
  numpy = pytest.importorskip("safetensors.numpy")
  folder = tmp_path / "model"
  folder.mkdir()
  numpy.save_file({"a": ARRAYS["a"]}, folder / "1.safetensors")
  numpy.save_file({"b": ARRAYS["b"]}, folder / "2.safetensors")
  numpy.save_file(ARRAYS, tmp_path / "outside.safetensors")
  valid = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
  names = st.sampled_from(
    ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "1.safetensors", ".", "..", "a\0.safetensors"]
  )
  maps = st.dictionaries(st.sampled_from("abc"), names | VALUES, max_size=3)
  listed = (maps | VALUES).map(lambda value: json.dumps({"weight_map": value}).encode())

  def check(data):
    (folder / INDEX).write_bytes(data)
    with answered(str(folder)):
      reader = Safetensors(folder)
      assert all(file.parent == folder and file.exists() for file in reader.files)
      read_all(reader)

  check(valid)
  assert set(Safetensors(folder).names) == {"a", "b"}
  check(json.dumps({"weight_map": {"a": "a" * 5000 + ".safetensors"}}).encode())
  each(mutated([valid]) | listed, count, check)


def gguf_bytes(path) -> bytes:
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in {"embedding_length": 8, "block_count": 1, "feed_forward_length": 12, "context_length": 64}.items():
    writer.add_uint32(f"llama.{key}", value)
  writer.add_uint32("llama.attention.head_count", 2)
  writer.add_uint32("llama.attention.head_count_kv", 1)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  writer.add_string("tokenizer.ggml.model", "gpt2")
  writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
  writer.add_array("tokenizer.ggml.merges", ["a b"])
  writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
  writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path.read_bytes()


@examples(60, 1000)
def test_gguf(tmp_path, count):
  path = tmp_path / "a.gguf"
  valid = gguf_bytes(path)
  end = valid.index(b"output_norm.weight") + 64  # of the header, about

  def in_header(at, size, value):
    return valid[:at] + value.to_bytes(8, "little")[:size] + valid[at + size :]

  numbers = st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**31, 2**63, 2**64 - 1])
  headers = st.builds(in_header, st.integers(0, end), st.sampled_from([1, 4, 8]), numbers)

  def check(data):
    path.write_bytes(data)
    with answered(str(path)):
      reader = bounded(lambda: Gguf(path))
      raw = reader.to_raw()
      to_config(raw, str(path))
      reader.tokenizer_json()
      for array in bounded(lambda: read_all(reader)).values():
        assert array.size <= 8 * len(data)  # a value has half a byte or more

  check(valid)
  assert Gguf(path).read("token_embd.weight").shape == (3, 8)
  each(mutated([valid]) | headers, count, check)


@examples(150, 3000)
def test_hf_configurations(count):
  raw = dict(
    model_type="llama", vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=64, rope_theta=10_000, hidden_act="silu",
    rope_scaling=None, rope_parameters=None, head_dim=4, tie_word_embeddings=False, sliding_window=None,
  )  # fmt: skip
  moe = raw | dict(
    model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, decoder_sparse_step=1,
    shared_expert_intermediate_size=10, mlp_only_layers=[], norm_topk_prob=True,
  )  # fmt: skip
  rope = st.fixed_dictionaries(
    {}, optional={key: VALUES | st.sampled_from(["llama3", "linear"]) for key in ("rope_type", "factor", "rope_theta")}
  )
  value = VALUES | rope | st.integers(-1, 9)
  changes = st.dictionaries(st.sampled_from(sorted(moe)), value, max_size=3)

  def check(changes):
    for base in (raw, moe):
      with answered("config.json"):
        to_config(base | changes, "config.json")

  each(changes, count, check)


@examples(100, 2000)
def test_adapters(tmp_path, count):
  path = tmp_path / "adapter.npz"
  np.savez(
    path, about=np.array(json.dumps({"format": "moe_lab adapter"})), **{"x/y_a": ARRAYS["a"], "x/y_b": ARRAYS["b"]}
  )
  valid = path.read_bytes()
  compressed = io.BytesIO()
  np.savez_compressed(compressed, about=np.zeros(4 << 20))

  def check(data):
    path.write_bytes(data)
    with answered("--adapter="):
      found = bounded(lambda: read_adapter(path))
      assert found.keys() == {"x"} or data != valid

  check(valid)
  np.testing.assert_array_equal(read_npz(path)["x/y_a"], ARRAYS["a"])
  check(compressed.getvalue())
  at = valid.index(b"(3, 4)")
  check(valid[:at] + b"(9,9,)" + valid[at + 6 :])
  each(mutated([valid]) | st.binary(max_size=60), count, check)
