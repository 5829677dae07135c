"""The next-token loss on several devices: each computes the logits of its own tokens.

The loss goes through the tokens in chunks; left to XLA's partitioner, all devices would go through all chunks. Devices
along "model", which have the same tokens, take a part of them each, with the whole vocabulary.
"""

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_lab.ops.cross_entropy import weighted_head_loss
from moe_lab.sharding.gather import gathered
from moe_lab.sharding.rules import AXES, num_along, parameter_spec, token_spec


def spread_head_loss(
  hidden_BLD: jax.Array, head_VD: jax.Array, target_BL: jax.Array, weight_BL: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
  """As `ops.cross_entropy.weighted_head_loss`, on all devices of a mesh.

  Args:
    hidden_BLD: after the final norm.
    head_VD: output embedding.
    target_BL: int32.
    weight_BL: float32, of each token; without gradient.
    mesh: of devices; None: one device.

  Returns:
    The sum of weight * nll (float32 []), and nll_BL, in nats, through which no gradient flows.
  """

  def local(hidden_BLD, head_VD, target_BL, weight_BL):
    if whole:
      head_VD = gathered(gathered(head_VD, "fsdp", 1, hidden_BLD.dtype), "model", 0, hidden_BLD.dtype)
    tokens = target_BL.size
    loss, nll_T = weighted_head_loss(
      hidden_BLD.reshape(tokens, -1), head_VD, target_BL.reshape(tokens), weight_BL.reshape(tokens)
    )
    return jax.lax.psum(loss, AXES) if whole else loss, nll_T.reshape(target_BL.shape)

  tokens = _tokens_of_all(mesh, *target_BL.shape)
  whole = tokens is not None
  if not whole:
    return local(hidden_BLD, head_VD, target_BL, weight_BL)
  in_specs = (tokens, parameter_spec("head_VD", 2), tokens, tokens)
  # The check of what varies over which axis does not know the gradient of `gathered`.
  run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(P(), tokens), check_vma=False)
  return run(hidden_BLD, head_VD, target_BL, weight_BL)


def _tokens_of_all(mesh: Mesh | None, batch: int, length: int) -> P | None:
  """Returns `token_spec` with stretches that are cut further along "model"; None if the tokens can't be spread so."""
  spec = token_spec(mesh, batch, length)
  if spec == P():
    return None
  stretch = (spec[1],) if isinstance(spec[1], str) else spec[1]
  parts = (*stretch, "model")
  return P(spec[0], parts) if length % num_along(mesh, parts) == 0 else None
