"""Expert parallelism: each device holds some experts, and the tokens' rows travel to them and back.

Tokens are spread over all axes of a mesh but "model", experts over "expert".
A device sorts the rows of its tokens by expert, hence by the device that holds
it; an all-to-all exchange takes them there and the results back (GShard, arXiv
2006.16668). No row is ever dropped: the buffers have room for all rows of all
devices that meet on one. Left to XLA's own partitioning, every device would
gather all experts' weights instead. Along "fsdp" devices share each of the
experts they hold, and fetch the rest for the layer at hand; along "model" each
has a stretch of the hidden width, and their results are added.

Dimensions here: N devices along "expert", E / N experts each; R rows sent by
a device, S rows in its buffer of received ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_lab.errors import ConfigError
from moe_lab.ops.grouped_mlp import ExpertWeights, expert_of_row, grouped_mlp, has_tokamax, num_experts_of
from moe_lab.ops.quantised import Quantised
from moe_lab.ops.rows import cut, gate_of_row, lay_out, sort_by_expert, to_rows, to_tokens
from moe_lab.sharding.gather import gathered
from moe_lab.sharding.rules import parameter_spec, token_spec

AXIS = "expert"


def platform(mesh: Mesh | None) -> str:
  """Returns what is compiled for; ahead of time, the mesh's devices are not this machine's own."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def splits(mesh: Mesh | None, batch: int, length: int) -> bool:
  """Returns whether there are several devices, and an equal share of B x L tokens for each."""
  return token_spec(mesh, batch, length) != P()


def _ragged_all_to_all(x_RD, send_N, receive_N, num_rows: int):
  """Sends the first rows to device 0, the next to device 1, ...; what arrives is in the senders' order."""
  sent_NN = jax.lax.all_gather(send_N, AXIS)  # [from, to]
  # Where this device's rows begin at each receiver: behind those of the devices before it.
  place_N = (jnp.cumsum(sent_NN, axis=0) - sent_NN)[jax.lax.axis_index(AXIS)]
  out_SD = jnp.zeros((num_rows, x_RD.shape[1]), x_RD.dtype)
  first_N = jnp.cumsum(send_N) - send_N
  return jax.lax.ragged_all_to_all(x_RD, out_SD, first_N, send_N, place_N, receive_N, axis_name=AXIS)


def _whole(w, dim: int, dtype):
  """Returns a weight of which devices along "fsdp" have a part each; one in 4 bits travels so, and has no gradient."""
  if isinstance(w, Quantised):
    return jax.tree.map(lambda part: jax.lax.all_gather(part, "fsdp", axis=dim, tiled=True), w)
  return gathered(w, "fsdp", dim, dtype)


def _local(x_BLD, expert_BLK, gate_BLK, valid_BLK, weights, *, devices: int, exchange: str, grouped_matmul: str):
  """One device's part: y_BLD of its tokens, by way of every device's experts."""
  x_TD, expert_TK, gate_TK, valid_TK = (
    leaf.reshape(-1, leaf.shape[-1]) for leaf in (x_BLD, expert_BLK, gate_BLK, valid_BLK)
  )
  num_tokens, slots = expert_TK.shape
  pairs, own = num_tokens * slots, num_experts_of(weights)
  all_to_all = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
  # Cast here, so that the gradients of devices along "data" are added in float32.
  shared = [name.partition("_")[2].index("D") for name in ExpertWeights._fields]  # the dimension along "fsdp"
  weights = ExpertWeights(*(_whole(w, dim, x_TD.dtype) for w, dim in zip(weights, shared, strict=True)))

  expert_R = jnp.where(valid_TK, expert_TK, devices * own).reshape(-1)
  pair_R, rows_E = sort_by_expert(expert_R, devices * own)
  sent_NE = rows_E.reshape(devices, own)
  received_NE = all_to_all(sent_NE)  # [from, own expert]
  send_N, receive_N = sent_NE.sum(1), received_NE.sum(1)
  if exchange == "padded":  # every block has room for all of a device's rows
    pair_R, used_R = cut(pair_R, send_N, pairs)
    expert_S = jax.vmap(expert_of_row, (0, None))(received_NE, pairs).reshape(-1)
    there = back = all_to_all
  else:
    used_R = jnp.arange(pairs) < send_N.sum()
    group_S = expert_of_row(received_NE.reshape(-1), devices * pairs)
    expert_S = jnp.where(group_S < devices * own, group_S % own, own)
    there = functools.partial(_ragged_all_to_all, send_N=send_N, receive_N=receive_N, num_rows=devices * pairs)
    back = functools.partial(_ragged_all_to_all, send_N=receive_N, receive_N=send_N, num_rows=pairs)

  layout = lay_out(pair_R, used_R, num_tokens, slots)
  x_SD = there(to_rows(x_TD, layout))
  order_S, rows_E = sort_by_expert(expert_S, own)
  # The received rows in order of their experts: each is a token with one slot.
  order = lay_out(order_S, jnp.arange(order_S.size) < rows_E.sum(), order_S.size, 1)
  y_RD = back(to_tokens(grouped_mlp(to_rows(x_SD, order), weights, rows_E, backend=grouped_matmul), order))
  gate_R = gate_of_row(gate_TK, pair_R, used_R)
  # Along "model" every device has the part of the result that comes of its stretch of the hidden width.
  y_TD = jax.lax.psum(to_tokens(y_RD * gate_R[:, None].astype(y_RD.dtype), layout), "model")
  return y_TD.reshape(x_BLD.shape)


def expert_parallel(
  x_TD: jax.Array,
  assignment: Any,
  weights: ExpertWeights,
  mesh: Mesh,
  *,
  batch: int,
  exchange: str | None = None,
  grouped_matmul: str = "auto",
) -> jax.Array:
  """Runs each token through its experts, wherever they are, and sums the gated results.

  Args:
    x_TD: hidden states of B sequences that the mesh `splits`.
    assignment: `routing.base.Assignment`, the experts of each token.
    weights: of all experts, spread as `rules.py` says; cast to the hidden states' type.
    mesh: of devices.
    batch: B.
    exchange: ragged (sends the rows in use) | padded (blocks of the worst case, for CPU, which has no ragged one);
      by default what the mesh's devices can do.
    grouped_matmul: what computes a device's rows: ragged_dot | tokamax | auto (tokamax on GPU where it is installed).

  Returns:
    y_TD in the hidden states' type, spread as the tokens are.

  Raises:
    ConfigError: the choice of grouped_matmul does not work on rows that come from other devices.
  """
  if grouped_matmul not in ("auto", "ragged_dot", "tokamax"):
    wanted = "auto, ragged_dot or tokamax, since the experts are spread over devices"
    raise ConfigError("model.grouped_matmul", grouped_matmul, wanted)
  if grouped_matmul == "auto":
    grouped_matmul = "tokamax" if platform(mesh) == "gpu" and has_tokamax() else "ragged_dot"
  if exchange is None:
    exchange = "padded" if platform(mesh) == "cpu" else "ragged"
  local = functools.partial(_local, devices=mesh.shape[AXIS], exchange=exchange, grouped_matmul=grouped_matmul)
  by_token = [
    leaf.reshape(batch, -1, leaf.shape[-1])
    for leaf in (x_TD, assignment.expert_TK, assignment.gate_TK, assignment.valid_TK)
  ]
  tokens = token_spec(mesh, *by_token[0].shape[:2])
  spread_weights = ExpertWeights(*(parameter_spec(name, 3) for name in ExpertWeights._fields))
  # The check of what varies over which axis knows neither the ragged exchange nor the kernels.
  run = jax.shard_map(
    local, mesh=mesh, in_specs=(tokens, tokens, tokens, tokens, spread_weights), out_specs=tokens, check_vma=False
  )
  return run(*by_token, weights).reshape(x_TD.shape)
