"""Hugging Face transformers on torch: the same shapes by Mixtral's own code."""

import time

import sentencepiece
import torch
import torch.utils.data
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks import flops
from benchmarks.case import BATCHES, NEW, PROMPT, Case
from benchmarks.work import Work

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
  if _DEVICE == "cuda":
    torch.cuda.synchronize()


def matmul(size: int, dtype: str) -> Work:
  """As `ours.matmul`."""
  a = torch.randn(size, size, device=_DEVICE).to(getattr(torch, dtype))

  def run():
    a @ a
    _wait()

  return Work(run, "product", 1, lambda: {"flops": 2 * size**3})


def memory() -> int | None:
  """As `ours.memory`."""
  return torch.cuda.max_memory_allocated() if _DEVICE == "cuda" else None


def _model(case: Case, experts: str) -> MixtralForCausalLM:
  torch.manual_seed(0)
  config = MixtralConfig(
    vocab_size=case.vocab_size,
    hidden_size=case.dim,
    intermediate_size=case.expert_dim,
    num_hidden_layers=case.num_layers,
    num_attention_heads=case.num_heads,
    num_key_value_heads=case.num_heads,
    head_dim=case.head_dim,
    num_local_experts=case.num_experts,
    num_experts_per_tok=int(case.k),
    max_position_embeddings=max(case.seq_len, 1024),
    output_router_logits=True,
    router_aux_loss_coef=0.01,
    sliding_window=None,
  )
  with torch.device(_DEVICE):  # drawn there: a GPU draws billions of numbers in no time
    model = MixtralForCausalLM(config)
  model.set_experts_implementation(experts)
  assert model.config._experts_implementation == experts
  return model


def _autocast(case: Case):
  # Parameters stay float32 as on our side; torch's way to compute in bfloat16 then is autocast.
  return torch.autocast(_DEVICE, getattr(torch, case.dtype), enabled=case.dtype != "float32")


def train_step(case: Case, variant: str) -> Work:
  """Forward, backward, clipping, fused AdamW; attention by torch's scaled_dot_product_attention."""
  model = _model(case, variant).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  tokens = torch.randint(0, case.vocab_size, (case.batch_size, case.seq_len), device=_DEVICE)

  def run():
    optimizer.zero_grad(set_to_none=True)
    with _autocast(case):
      loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    _wait()

  def report():
    return {"mean_experts": case.k, "flops": flops.train_step(case, case.k, tokens.numel())}

  return Work(run, "token", tokens.numel(), report)


def moe_layer(case: Case, variant: str) -> Work:
  """Mixtral's sparse block, forward and backward."""
  block = _model(case, variant).train().model.layers[0].mlp
  x = torch.randn(case.batch_size, case.seq_len, case.dim, device=_DEVICE, requires_grad=True)
  dy = torch.randn_like(x)

  def run():
    x.grad = None
    block.zero_grad(set_to_none=True)
    with _autocast(case):
      y = block(x)
    y.backward(dy.to(y.dtype))
    _wait()

  tokens = case.batch_size * case.seq_len
  return Work(run, "token", tokens, lambda: {"mean_experts": case.k, "flops": flops.moe_layer(case, case.k)})


def attention_layer(case: Case, variant: str) -> Work:
  """torch's scaled_dot_product_attention, causal, forward and backward."""
  shape = (case.batch_size, case.num_heads, case.seq_len, case.head_dim)
  q, k, v, d_out = (torch.randn(shape, device=_DEVICE).to(getattr(torch, case.dtype)) for _ in range(4))
  for one in (q, k, v):
    one.requires_grad_()

  def run():
    q.grad = k.grad = v.grad = None
    torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(d_out)
    _wait()

  return Work(run, "token", case.batch_size * case.seq_len, lambda: {"flops": flops.attention(case)})


def decode(case: Case, variant: str) -> Work:
  """Greedy `generate` of a batch with its cache; weights in the type of the products, as models are served."""
  model = _model(case, variant).to(getattr(torch, case.dtype)).eval()
  prompt = torch.randint(3, case.vocab_size, (case.sequences, PROMPT), device=_DEVICE)

  def run():
    with torch.no_grad():
      model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        pad_token_id=0, output_router_logits=False,
      )  # fmt: skip
    _wait()

  return Work(run, "token", NEW * case.sequences, lambda: {"mean_experts": case.k, "flops": flops.decode(case, case.k)})


class _PackedRows(torch.utils.data.IterableDataset):
  """Documents in random order, tokenised once, end to end, cut into rows: what training scripts on torch do."""

  def __init__(self, texts: list[str], model: bytes, row_length: int):
    self._texts, self._row_length, self._tokens = texts, row_length, {}
    self._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)

  def _document(self, index: int) -> torch.Tensor:
    if index not in self._tokens:
      ids = self._tokenizer.encode(self._texts[index], add_bos=True, add_eos=True)
      self._tokens[index] = torch.tensor(ids, dtype=torch.int32)
    return self._tokens[index]

  def __iter__(self):
    held = torch.zeros(0, dtype=torch.int32)
    while True:
      for index in torch.randperm(len(self._texts)).tolist():
        rows = torch.cat([held, self._document(index)]).split(self._row_length)
        held = rows[-1] if len(rows[-1]) < self._row_length else rows[-1][:0]
        yield from (row for row in rows if len(row) == self._row_length)


def data(case: Case, variant: str) -> Work:
  """torch's DataLoader over the same documents and tokenizer; rows of a document are shuffled among others'."""
  from moe_lab.config.program import cache_dir
  from moe_lab.data.loader import open_data
  from moe_lab.data.sources import open_source

  config = case.config().data
  tokenizer = open_data(config, cache_dir()).tokenizer  # trained, or found in the cache
  texts = [document.text for spec in config.sources for document in open_source(spec)]
  started = time.perf_counter()
  rows = _PackedRows(texts, tokenizer.model, case.seq_len + 1)
  shuffled = torch.utils.data.datapipes.iter.Shuffler(rows, buffer_size=1024)
  batches = iter(torch.utils.data.DataLoader(shuffled, batch_size=case.batch_size))
  next(batches)
  first = time.perf_counter() - started

  def run():
    for _ in range(BATCHES):
      next(batches)

  return Work(run, "token", BATCHES * case.batch_size * case.seq_len, lambda: {"seconds_to_first_batch": first})


BENCHMARKS = {
  "train_step": train_step,
  "moe_layer": moe_layer,
  "attention": attention_layer,
  "decode": decode,
  "data": data,
}
