"""A mixture of experts out of a dense model: sparse upcycling (arXiv 2212.05055), also into fine experts (2410.07524).

Each expert is a copy of its layer's MLP, or one of G pieces of a copy's hidden width. A router of random rows chooses
among the copies; the pieces of a copy have one row, so that they are chosen together, and their gates are a G-th of the
copy's: their outputs are multiplied by G. Gates sum to one, so the layer is the MLP that it was, whatever the router
says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from moe_lab.adapt.tensors import check_experts, counted, params_of, spelled, tensors
from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.nn.layers import scaled_normal

_MLP = {"gate_DF": "gate_EDF", "up_DF": "up_EDF", "down_FD": "down_EFD"}


def upcycled(params: Any, config: Config, key: jax.Array) -> tuple[dict, dict]:
  """Returns the parameters of a mixture of experts that computes what the dense model does, and a report.

  Args:
    params: plain, of a model whose layers are all dense, stacked.
    config: of the new model, whose `dense_dim` is the old one's width.
    key: of the routers.

  Returns:
    Parameters, and tensors (of experts, a layer's each), copies, pieces (of each copy).

  Raises:
    UserError: a tensor of an MLP was missed or is left over.
  """
  model = config.model
  pieces = model.dense_dim // model.expert_dim
  copies = model.num_experts // pieces
  by_path, made = tensors(params), {}
  for path, leaf in by_path.items():
    if path[0] != "dense_layers":
      made[path] = leaf
    elif path[1] != "mlp":
      made["moe_layers", *path[1:]] = leaf
    elif path[-1] in _MLP:
      if path[-1] == "down_FD":
        cut = rearrange(leaf, "Z (g F) D -> Z g F D", g=pieces) * pieces
      else:
        cut = rearrange(leaf, "Z D (g F) -> Z g D F", g=pieces)
      made["moe_layers", "moe", _MLP[path[-1]]] = repeat(cut, "Z g ... -> Z (c g) ...", c=copies)
    else:
      raise UserError(f"{spelled(path)} was left over: wanted only {', '.join(_MLP)} of each MLP")
  rows = scaled_normal(model.dim**-0.5)(key, (model.num_layers, model.dim, copies), jnp.float32)
  made["moe_layers", "moe", "router_DE"] = repeat(rows, "Z D c -> Z D (c g)", g=pieces)
  params = params_of(made)
  touched = counted([path for path in made if path[-1] in _MLP.values()], made)
  check_experts(touched, made, config)
  return params, {"tensors": touched, "copies": copies, "pieces": pieces}
