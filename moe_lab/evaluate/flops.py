"""Analytical FLOPs of a forward pass, per token; a multiply-add counts two."""

from moe_lab.config.schema import Config
from moe_lab.routing.registry import make_router


def forward_flops_per_token(config: Config, mean_experts: float, mean_context: float) -> dict[str, float]:
  """Returns FLOPs by component and their "total".

  Norms, softmaxes and other elementwise work are left out: they are of lower
  order in D. Training costs three times as much (forward, and two products of
  the same size for each in the backward pass).

  Args:
    config: shapes.
    mean_experts: executed (token, expert) rows per token and layer.
    mean_context: keys a query sees, on average.
  """
  model = config.model
  num_moe = model.num_layers - model.num_dense_layers
  heads = 2 * model.num_heads + 2 * model.num_kv_heads  # query and output; key and value
  router_sizes = [shape for shape, _ in make_router(config.routing).parameters(model).values() if len(shape) == 2]
  flops = {
    "attention_projections": model.num_layers * 2 * model.dim * heads * model.head_dim,
    "attention_scores": model.num_layers * 4 * model.num_heads * model.head_dim * mean_context,
    "router": num_moe * sum(2 * rows * columns for rows, columns in router_sizes),
    "experts": num_moe * 6 * model.dim * (mean_experts * model.expert_dim + model.shared_width),
    "dense_mlp": model.num_dense_layers * 6 * model.dim * model.dense_dim,
    "head": 2 * model.dim * config.data.vocab_size,
  }
  return flops | {"total": sum(flops.values())}
