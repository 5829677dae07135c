"""A moe_lab model in PyTorch: what is computed at inference, plainly, for transformers with trust_remote_code.

An export carries a copy of this file, which imports nothing of moe_lab. Parameters have moe_lab's names and shapes;
letters: B batch, L queries, S keys, D width, V vocabulary, N query heads, M key/value heads, G = N / M, H head width,
F hidden width, T = B * L tokens, E experts, K expert slots, J budgets of a table.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, dtype="float32")
    output = model(input_ids, budget=2.0)  # the mean count to ask for, where the model can be asked
    output.logits, output.experts  # experts: int [Z, B, L], how many each token takes in each of Z layers
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

KNOTS = 8  # J, of a budget table
# What transformers calls the cache: the second name is the older.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class MoeLabConfig(PretrainedConfig):
  """`shapes` and `routing` are moe_lab's sections `model` and `routing`, `budget` the mean count that is asked for."""

  model_type = "moe_lab"

  def __init__(self, shapes=None, routing=None, vocab_size=0, budget=1.0, **kwargs):
    self.shapes, self.routing = shapes or {}, routing or {}
    self.vocab_size, self.budget = vocab_size, budget
    self.hidden_size = self.shapes.get("dim", 0)
    self.num_hidden_layers = self.shapes.get("num_layers", 0)
    self.num_attention_heads = self.shapes.get("num_heads", 0)
    kwargs.setdefault("tie_word_embeddings", False)  # it is done here
    super().__init__(**kwargs)


@dataclass
class MoeLabOutput(CausalLMOutputWithPast):
  """What a forward pass returns. experts: int [Z, B, L], how many each token takes; None: a model without experts."""

  experts: torch.Tensor | None = None


def parameter(*shape: int) -> nn.Parameter:
  return nn.Parameter(torch.zeros(shape))


def constant(*shape: int) -> nn.Parameter:
  """What routing knows besides its parameters."""
  return nn.Parameter(torch.zeros(shape), requires_grad=False)


def rms_normalise(x, epsilon):
  x = x.float()
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def swiglu(x, gate_DF, up_DF, down_FD):
  return (nn.functional.silu(x @ gate_DF) * (x @ up_DF)) @ down_FD


class Norm(nn.Module):
  """RMSNorm."""

  def __init__(self, dim, epsilon):
    super().__init__()
    self.epsilon, self.gain_D = epsilon, parameter(dim)

  def forward(self, x):
    return (rms_normalise(x, self.epsilon) * self.gain_D).to(x.dtype)


class HeadNorm(nn.Module):
  """RMSNorm of queries or keys, head by head or (`together`) of a token's heads; gains are held to a bound."""

  def __init__(self, shapes, letter):
    super().__init__()
    self.epsilon, self.together = shapes["norm_epsilon"], shapes["qk_norm_over"] == "all"
    heads, width = shapes["num_heads" if letter == "N" else "num_kv_heads"], shapes["head_dim"]
    self.limit = math.sqrt(shapes["qk_bound"] * width**-0.5) if shapes["qk_bound"] else math.inf
    self.gain_name = f"gain_{letter}H" if self.together else "gain_H"
    self.register_parameter(self.gain_name, parameter(heads, width) if self.together else parameter(width))

  def forward(self, x):
    rows = x.flatten(-2) if self.together else x
    gain = getattr(self, self.gain_name).clamp(-self.limit, self.limit)
    return (rms_normalise(rows, self.epsilon).reshape(x.shape) * gain).to(x.dtype)


def rotate(x_BLNH, position_BL, shapes):
  """Rotary embedding, halves side by side."""
  half = x_BLNH.shape[-1] // 2
  frequency = shapes["rotary_base"] ** (-torch.arange(half, device=x_BLNH.device).float() / half)
  if shapes["rotary_stretch"]:
    factor, low, high, length = shapes["rotary_stretch"]
    kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (kept + (1 - kept) / factor)
  angle = (position_BL[..., None].float() / shapes["position_interpolation"] * frequency)[:, :, None]
  one, two = x_BLNH.float().chunk(2, dim=-1)
  rotated = (one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin())
  return torch.cat(rotated, dim=-1).to(x_BLNH.dtype)


def slopes(shapes):
  """Returns ALiBi's slope of each key/value head, steepest first, those that see everything (0) last."""
  if shapes["position"] == "rotary":
    return torch.zeros(shapes["num_kv_heads"])
  windowed = shapes["num_kv_heads"] - shapes["num_global_groups"]
  steep = [2 ** (-8 * (m + 0.5) / windowed) / shapes["position_interpolation"] for m in range(windowed)]
  return torch.tensor(steep + [0.0] * shapes["num_global_groups"])


class Attention(nn.Module):
  """Causal grouped-query attention with ALiBi slopes or rotary positions."""

  def __init__(self, shapes, layer):
    super().__init__()
    self.shapes, self.layer = shapes, layer
    dim, width = shapes["dim"], shapes["head_dim"]
    heads, groups = shapes["num_heads"], shapes["num_kv_heads"]
    self.query_DNH, self.out_NHD = parameter(dim, heads, width), parameter(heads, width, dim)
    self.key_DMH, self.value_DMH = parameter(dim, groups, width), parameter(dim, groups, width)
    if shapes["qkv_bias"]:
      self.query_bias_NH = parameter(heads, width)
      self.key_bias_MH, self.value_bias_MH = parameter(groups, width), parameter(groups, width)
    if shapes["qk_norm"]:
      self.query_norm, self.key_norm = HeadNorm(shapes, "N"), HeadNorm(shapes, "M")

  def forward(self, x_BLD, position_BL, seen_BLS, distance_LS, cache):
    shapes = self.shapes
    q_BLNH = torch.einsum("BLD,DNH->BLNH", x_BLD, self.query_DNH)
    k_BLMH = torch.einsum("BLD,DMH->BLMH", x_BLD, self.key_DMH)
    v_BLMH = torch.einsum("BLD,DMH->BLMH", x_BLD, self.value_DMH)
    if shapes["qkv_bias"]:
      q_BLNH, k_BLMH, v_BLMH = q_BLNH + self.query_bias_NH, k_BLMH + self.key_bias_MH, v_BLMH + self.value_bias_MH
    if shapes["qk_norm"]:
      q_BLNH, k_BLMH = self.query_norm(q_BLNH), self.key_norm(k_BLMH)
    if shapes["position"] == "rotary":
      q_BLNH, k_BLMH = rotate(q_BLNH, position_BL, shapes), rotate(k_BLMH, position_BL, shapes)
    slope_M = slopes(shapes).to(x_BLD.device)
    if shapes["sharpen_from"]:  # where there is no slope, queries grow with the position beyond the trained length
      growth_BL = (torch.log(position_BL + 1.0) / math.log(shapes["sharpen_from"])).clamp(min=1.0)
      is_global_N = (slope_M == 0).repeat_interleave(shapes["num_heads"] // shapes["num_kv_heads"])
      q_BLNH = q_BLNH * torch.where(is_global_N, growth_BL[..., None], 1.0)[..., None].to(q_BLNH.dtype)

    k_BMSH, v_BMSH = k_BLMH.transpose(1, 2), v_BLMH.transpose(1, 2)
    if cache is not None:
      k_BMSH, v_BMSH = cache.update(k_BMSH, v_BMSH, self.layer)
    q_BLMGH = q_BLNH.unflatten(2, (shapes["num_kv_heads"], -1))
    logits = torch.einsum("BLMGH,BMSH->BMGLS", q_BLMGH, k_BMSH).float() * shapes["head_dim"] ** -0.5
    logits = logits - slope_M[:, None, None, None] * distance_LS
    weights = logits.masked_fill(~seen_BLS[:, None, None], torch.finfo(logits.dtype).min).softmax(-1).to(x_BLD.dtype)
    out_BLNH = torch.einsum("BMGLS,BMSH->BLMGH", weights, v_BMSH).flatten(2, 3)
    return torch.einsum("BLNH,NHD->BLD", out_BLNH, self.out_NHD)


class MLP(nn.Module):
  """The dense SwiGLU MLP."""

  def __init__(self, dim, hidden):
    super().__init__()
    self.gate_DF, self.up_DF, self.down_FD = parameter(dim, hidden), parameter(dim, hidden), parameter(hidden, dim)

  def forward(self, x):
    return swiglu(x, self.gate_DF, self.up_DF, self.down_FD)


def read_table(table_J, budget, budget_range):
  """Reads a number at a budget: the table's one, or between two of J knots that are equally far in log budget."""
  if not budget_range:
    return table_J[0]
  low, high = budget_range
  place = min(max(math.log(budget / low) / math.log(high / low) * (KNOTS - 1), 0), KNOTS - 1)
  share_J = (1 - (place - torch.arange(KNOTS, device=table_J.device)).abs()).clamp(min=0)
  return (share_J * table_J).sum()


def log_prior(budget, k_min, k_max):
  """Returns, of all distributions over k_min..k_max with the mean `budget`, the log of the one of most entropy."""
  tilts, counts = 12 * np.linspace(-1, 1, 2049) ** 3, np.arange(k_min, k_max + 1)
  weights = np.exp(tilts[:, None] * (counts - np.where(tilts > 0, k_max, k_min)[:, None]))
  means = weights @ counts / weights.sum(1)
  return torch.tensor(np.interp(budget, means, tilts) * counts, dtype=torch.float32).log_softmax(-1)


class MoE(nn.Module):
  """Router, count, experts, and what every token takes."""

  def __init__(self, shapes, routing):
    super().__init__()
    self.routing, self.dynamic = routing, routing["method"] == "dynamic"
    self.by_value = self.dynamic and routing["learner"] == "curvature"
    dim, hidden, num = shapes["dim"], shapes["expert_dim"], shapes["num_experts"]
    self.slots = routing["k_max"] if self.dynamic else routing["k"]
    self.router_DE, self.bias_E = parameter(dim, num), constant(num)
    if routing["standardise"]:
      self.log_scale = parameter(1)
    if self.dynamic:
      choices = routing["k_max"] - routing["k_min"] + (0 if self.by_value else 1)
      features = dim + 1 + (self.slots if self.by_value and routing["policy_input"] == "hidden" else 0)
      width = routing["policy_width"]
      self.policy_in, self.policy_bias, self.policy_out = (
        parameter(features, width), parameter(width), parameter(width, choices),
      )  # fmt: skip
      if routing["learner"] in ("value", "ppo"):  # which only learning reads
        self.value_in, self.value_bias, self.value_out = (
          parameter(features, width),
          parameter(width),
          parameter(width, 1),
        )
      self.threshold_J = constant(KNOTS if routing["budget_range"] else 1)
    self.gate_EDF, self.up_EDF, self.down_EFD = (
      parameter(num, dim, hidden), parameter(num, dim, hidden), parameter(num, hidden, dim),
    )  # fmt: skip
    shared_width = shapes["shared_dim"] or shapes["num_shared_experts"] * hidden
    self.shared = MLP(dim, shared_width) if shared_width else None
    if shared_width and shapes["shared_gate"]:
      self.shared_gate_D = parameter(dim)
    self.has_shared_gate = bool(shared_width and shapes["shared_gate"])

  def choose(self, logits_TE):
    """Returns expert_TK: each token's best experts, best first. The bias decides the choice and no gate."""
    score_TE = (logits_TE.sigmoid() if self.routing["gate"] == "sigmoid" else logits_TE) + self.bias_E
    groups, kept = self.routing["expert_groups"], self.routing["groups_kept"]
    if kept < groups:  # only the groups whose two best experts are best
      grouped_TGE = score_TE.unflatten(1, (groups, -1))
      value_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[2]), dim=2).values.sum(2)
      rank_TG = value_TG.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
      score_TE = score_TE.masked_fill((rank_TG >= kept).repeat_interleave(grouped_TGE.shape[2], dim=1), -math.inf)
    return score_TE.sort(dim=1, descending=True, stable=True).indices[:, : self.slots]

  def count(self, x_TD, embedding_TD, logits_TE, expert_TK, budget):
    """Returns count_T: how many of its experts each token takes."""
    routing = self.routing
    if not self.dynamic:
      return torch.full((x_TD.shape[0],), routing["k"], device=x_TD.device)
    k_min, k_max, by_token = routing["k_min"], routing["k_max"], routing["policy_input"] == "token"
    seen_TD = (embedding_TD if by_token else x_TD).float()
    features = torch.cat([seen_TD, torch.full_like(seen_TD[:, :1], budget / k_max)], dim=1)
    log_gate_TK = logits_TE.log_softmax(-1).gather(1, expert_TK) + math.log(logits_TE.shape[1])
    if self.by_value and not by_token:
      features = torch.cat([features, log_gate_TK], dim=1)
    head = nn.functional.silu(features @ self.policy_in + self.policy_bias) @ self.policy_out
    at_budget = read_table(self.threshold_J, budget, routing["budget_range"])
    if self.by_value:  # log value of each further expert; on as long as it is worth its price
      if not by_token:
        if routing["gate"] in ("softmax_unit", "softmax_kept"):
          log_gate_TK = log_gate_TK - 0.5 * (2 * log_gate_TK).exp().cumsum(1).log()
        head = head + 2 * log_gate_TK[:, k_min:]
      goes_on = (head > at_budget) & (budget > k_min)
      return k_min + goes_on.long().cumprod(1).sum(1)
    log_prob = (head + log_prior(budget, k_min, k_max).to(head.device)).log_softmax(-1)
    expected_T = log_prob.exp() @ torch.arange(k_min, k_max + 1, device=head.device).float()
    return (expected_T + at_budget).round().clamp(k_min, k_max).long()

  def gates(self, logits_TE, expert_TK, valid_TK):
    """Returns gate_TK, 0 in slots that are not valid."""
    kind, chosen_TK = self.routing["gate"], logits_TE.gather(1, expert_TK)
    if kind in ("softmax_chosen", "softmax_kept"):
      gate_TK = chosen_TK.softmax(-1)
    elif kind == "sigmoid":
      gate_TK = chosen_TK.sigmoid() / chosen_TK.sigmoid().sum(-1, keepdim=True)
    else:
      gate_TK = logits_TE.softmax(-1).gather(1, expert_TK)
    wanted_T1 = gate_TK.square().sum(-1, keepdim=True) if kind == "softmax_kept" else 1.0
    gate_TK = gate_TK * valid_TK
    if kind in ("softmax_unit", "softmax_kept"):
      gate_TK = gate_TK * wanted_T1**0.5 * torch.rsqrt(gate_TK.square().sum(-1, keepdim=True).clamp(min=1e-12))
    return gate_TK

  def forward(self, x_TD, embedding_TD, mask_T, budget):
    """Returns the sum of the experts' outputs, and count_T."""
    logits_TE = x_TD.float() @ self.router_DE.float()
    if self.routing["standardise"]:
      variance_T1 = logits_TE.var(-1, unbiased=False, keepdim=True)
      logits_TE = (logits_TE - logits_TE.mean(-1, keepdim=True)) * torch.rsqrt(variance_T1 + 1e-5)
      logits_TE = self.log_scale.exp() * logits_TE
    expert_TK = self.choose(logits_TE)
    count_T = self.count(x_TD, embedding_TD, logits_TE, expert_TK, budget) * mask_T
    valid_TK = torch.arange(self.slots, device=x_TD.device) < count_T[:, None]
    gate_TK = self.gates(logits_TE, expert_TK, valid_TK).to(x_TD.dtype)
    y_TD = torch.zeros_like(x_TD)
    for expert in expert_TK[valid_TK].unique().tolist():
      token, slot = torch.where((expert_TK == expert) & valid_TK)
      weights = self.gate_EDF[expert], self.up_EDF[expert], self.down_EFD[expert]
      y_TD.index_add_(0, token, swiglu(x_TD[token], *weights) * gate_TK[token, slot, None])
    if self.shared is not None:
      shared_TD = self.shared(x_TD)
      if self.has_shared_gate:
        shared_TD = shared_TD * (x_TD.float() @ self.shared_gate_D.float()).sigmoid()[:, None].to(x_TD.dtype)
      y_TD = y_TD + shared_TD
    return y_TD, count_T


class Layer(nn.Module):
  """Attention and MLP or MoE, each of the normed stream, each added to it."""

  def __init__(self, config, layer):
    super().__init__()
    shapes = config.shapes
    self.attention_norm = Norm(shapes["dim"], shapes["norm_epsilon"])
    self.mlp_norm = Norm(shapes["dim"], shapes["norm_epsilon"])
    self.attention = Attention(shapes, layer)
    self.is_moe = layer >= shapes["num_dense_layers"]
    if self.is_moe:
      self.moe = MoE(shapes, config.routing)
    else:
      self.mlp = MLP(shapes["dim"], shapes["dense_dim"])

  def forward(self, x_BLD, embedding_BLD, mask_BL, budget, *positions):
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), *positions)
    normed_BLD = self.mlp_norm(x_BLD)
    if not self.is_moe:
      return x_BLD + self.mlp(normed_BLD), None
    y_TD, count_T = self.moe(normed_BLD.flatten(0, 1), embedding_BLD.flatten(0, 1), mask_BL.flatten(), budget)
    return x_BLD + y_TD.reshape(x_BLD.shape), count_T.reshape(mask_BL.shape)


class MoeLabForCausalLM(PreTrainedModel, GenerationMixin):
  """The shapes with its head."""

  config_class = MoeLabConfig
  _no_split_modules = ["Layer"]

  def __init__(self, config):
    super().__init__(config)
    shapes = config.shapes
    self.embedding_VD = parameter(config.vocab_size, shapes["dim"])
    self.layers = nn.ModuleList(Layer(config, layer) for layer in range(shapes["num_layers"]))
    self.final_norm = Norm(shapes["dim"], shapes["norm_epsilon"])
    if not shapes["tie_embeddings"]:
      self.head_VD = parameter(config.vocab_size, shapes["dim"])
    self.post_init()

  def _init_weights(self, module):
    """Weights are loaded, never drawn."""

  def forward(
    self,
    input_ids,
    attention_mask=None,
    cache=None,
    past_key_values=None,
    labels=None,
    use_cache=None,
    budget=None,
    **_,
  ):
    """Predicts the next token at every position.

    Args:
      input_ids: [B, L].
      attention_mask: [B, S], 0 for padding, of earlier tokens too; None: there is none.
      cache, past_key_values: keys and values of earlier tokens; two names of one thing.
      labels: [B, L], to have the loss.
      use_cache: return a cache.
      budget: mean experts to ask for; None: the configuration's.
    """
    shapes, budget = self.config.shapes, float(self.config.budget if budget is None else budget)
    cache = past_key_values if cache is None else cache
    if cache is None and use_cache:
      cache = DynamicCache()
    before, length = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
    if attention_mask is None:
      attention_mask = input_ids.new_ones(input_ids.shape[0], before + length)
    real_BS = attention_mask[:, : before + length].bool()
    position_BL = (real_BS.long().cumsum(1) - 1).clamp(min=0)[:, before:]
    key_S = torch.arange(before + length, device=input_ids.device)
    distance_LS = (key_S[before:, None] - key_S).float()
    seen_BLS = (distance_LS >= 0) & real_BS[:, None]

    x_BLD = self.embedding_VD[input_ids] * (math.sqrt(shapes["dim"]) if shapes["scale_embeddings"] else 1.0)
    embedding_BLD, counts = x_BLD, []
    for layer in self.layers:
      x_BLD, count_BL = layer(
        x_BLD, embedding_BLD, real_BS[:, before:], budget, position_BL, seen_BLS, distance_LS, cache
      )
      counts += [] if count_BL is None else [count_BL]
    head_VD = self.embedding_VD if shapes["tie_embeddings"] else self.head_VD
    logits_BLV = torch.einsum("BLD,VD->BLV", self.final_norm(x_BLD), head_VD).float()
    loss = None
    if labels is not None:
      loss = nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return MoeLabOutput(
      loss=loss,
      logits=logits_BLV,
      experts=torch.stack(counts) if counts else None,
      **{CACHE: cache},
    )
