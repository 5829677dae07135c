"""moe_lab's side of each benchmark."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops
from benchmarks.case import BATCHES, HARD, NEW, PROMPT, Case
from benchmarks.work import Work
from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from moe_lab.nn.moe import MoE
from moe_lab.nn.transformer import Transformer
from moe_lab.ops.attention import attention
from moe_lab.routing.base import Decisions, RouterContext, initial_router_state
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state
from moe_lab.train.step import make_train_step
from moe_lab.types import Batch


def matmul(size: int, dtype: str) -> Work:
  """A dense product of two [size, size] matrices: the machine's peak."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
  product = jax.jit(lambda a, b: a @ b)
  return Work(lambda: jax.block_until_ready(product(a, a)), "product", 1, lambda: {"flops": 2 * size**3})


def memory() -> int | None:
  """Returns the most bytes that the accelerator's memory held; None on CPU."""
  stats = jax.devices()[0].memory_stats()
  return None if jax.default_backend() == "cpu" or not stats else stats["peak_bytes_in_use"]


def _random_batch(case: Case) -> Batch:
  tokens = np.random.default_rng(0).integers(0, case.vocab_size, (case.batch_size, case.seq_len + 1), np.int32)
  return Batch(*(jnp.asarray(a) for a in (tokens, np.ones_like(tokens), np.zeros_like(tokens))))


def train_step(case: Case, variant: str) -> Work:
  """A whole step: forward, backward, clipping, AdamW, controllers."""
  config = case.config()
  optimizer = make_optimizer(config.train)
  step = make_train_step(config, Transformer(config), optimizer)
  now = {"state": jax.jit(lambda: initial_state(config, optimizer))(), "metrics": []}
  batch = _random_batch(case)

  def run():
    now["state"], metrics = step(now["state"], batch)
    jax.block_until_ready((now["state"], metrics))
    now["metrics"].append(metrics)

  def report():
    mean = float(np.mean([metrics.count_mean_Z() for metrics in now["metrics"]]))
    executed = float(np.mean([metrics.token_count for metrics in now["metrics"]]))  # second rollouts included
    return {"mean_experts": mean, "rolled_out_tokens": executed, "flops": flops.train_step(case, mean, executed)}

  return Work(run, "token", case.batch_size * case.seq_len, report)


def moe_layer(case: Case, variant: str) -> Work:
  """One layer's router, dispatch and experts, forward and backward.

  With the method "overflow" every token takes the same k_max experts: more rows than any share of them foresees.
  """
  config, tokens = case.config(), case.batch_size * case.seq_len
  decisions = Decisions()
  if case.method == "overflow":
    expert_TK = jnp.tile(jnp.arange(case.k_max, dtype=jnp.int32), (tokens, 1))
    decisions = Decisions(jnp.full(tokens, case.k_max), expert_TK)
  layer = MoE(config.model, config.routing, 1.0)
  state = jax.tree.map(lambda x: x[0], initial_router_state(1, case.num_experts))
  x_TD, dy_TD = jax.random.normal(jax.random.key(0), (2, tokens, case.dim)).astype(case.dtype)

  def context(key):
    embedding = jnp.zeros((tokens, case.dim))
    return RouterContext(jnp.ones(tokens, bool), jnp.full(tokens, case.k), embedding, state, key, decisions)

  params = jax.jit(layer.init)(jax.random.key(1), x_TD, context(jax.random.key(2)))

  @jax.jit
  def both_ways(params, x_TD, dy_TD, key):
    def loss(params, x_TD):
      y_TD, stats = layer.apply(params, x_TD, context(key))
      return jnp.sum(y_TD * dy_TD, dtype=jnp.float32), stats

    # The loss is returned too: an output that nobody asks for would not be computed.
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_TD)

  done = []

  def run():
    (_, stats), _ = jax.block_until_ready(both_ways(params, x_TD, dy_TD, jax.random.key(len(done))))
    done.append(stats)

  def report():
    mean = float(np.mean([stats.count_T for stats in done]))
    numbers = {"mean_experts": mean, "flops": flops.moe_layer(case, mean)}
    if case.method == "overflow":
      dense = MoE(dataclasses.replace(config.model, dispatch="dense"), config.routing, 1.0)
      key = jax.random.key(0)
      (got, stats), (want, _) = (jax.jit(m.apply)(params, x_TD, context(key)) for m in (layer, dense))
      numbers |= {"rows": float(stats.assigned_E.sum()), "rows_lost": float(stats.dropped_sum)}
      numbers["error_to_dense"] = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    return numbers

  return Work(run, "token", tokens, report)


def attention_layer(case: Case, variant: str) -> Work:
  """Causal attention without its projections, forward and backward."""
  shape = (case.batch_size, case.seq_len, case.num_heads, case.head_dim)
  q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, *shape)).astype(case.dtype)
  segments = jnp.ones(shape[:2], jnp.int32)

  @jax.jit
  def both_ways(q, k, v, d_out):
    def loss(q, k, v):
      out = attention(q, k, v, jnp.zeros(case.num_heads), segments, segments, backend=variant or "auto")
      return jnp.sum(out * d_out, dtype=jnp.float32)

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

  def run():
    jax.block_until_ready(both_ways(q, k, v, d_out))

  return Work(run, "token", case.batch_size * case.seq_len, lambda: {"flops": flops.attention(case)})


def decode(case: Case, variant: str) -> Work:
  """Greedy generation of a batch, the prompts' prefill included."""
  if case.method == "dynamic":
    return _decode_mixed(case, variant)
  engine, prompts = _engine(case), _prompts(case)
  experts = []

  def run():
    experts.extend(token.experts for _, token in engine.generate([Request(prompt, NEW) for prompt in prompts]))

  def report():
    mean = float(np.mean(experts))
    return {"mean_experts": mean, "flops": flops.decode(case, mean)}

  return Work(run, "token", NEW * case.sequences, report)


def _engine(case: Case, **arguments) -> Engine:
  config = case.config()

  @jax.jit
  def initial():
    state = initial_state(config, make_optimizer(config.train))
    return state.params, state.router_state  # the optimizer's state, twice the parameters, is then never made

  settings = {"slots": case.sequences, "capacity": PROMPT + NEW} | arguments
  return Engine(config, *initial(), **settings)


def _prompts(case: Case) -> np.ndarray:
  return np.random.default_rng(0).integers(0, case.vocab_size, (case.sequences, PROMPT)).astype(np.int32)


def _decode_mixed(case: Case, variant: str) -> Work:
  """Easy sequences beside hard ones; `steady` or not. A token's time is that of the step that made it.

  The untrained policy gives each token the count that its sequence asks for: one to easy ones and k_max to hard ones.
  From run to run there are HARD of eight, so many that all together ask for the budget. In the variant `equal` all ask
  for the mean, so that every step does the same work and what spreads its times is the machine. Timed are the steps in
  which every slot decodes and no prompt is read.
  """
  engine, prompts = _engine(case, steps=1, steady=variant == "steady", budget=case.k), _prompts(case)
  runs, timed = itertools.count(), []  # of each run a list of steps, seconds and mean experts each

  def run():
    number = next(runs)
    timed.append([])
    for index, prompt in enumerate(prompts):
      mixed = case.k_max if index < HARD[number % len(HARD)] else 1
      engine.submit(Request(prompt, NEW, budget=float(case.k if variant == "equal" else mixed)))
    while engine.busy:
      reading, started = engine.reading, time.perf_counter()
      tokens = engine.step()
      taken = time.perf_counter() - started
      if not reading and len(tokens) == case.sequences:
        timed[-1].append((taken, sum(token.experts for _, token in tokens) / len(tokens)))

  def report():
    seconds, experts = zip(*itertools.chain(*timed), strict=True)
    p50, p99 = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    times = {"p50_ms": p50, "p99_ms": p99, "p99_over_p50": p99 / p50}
    return {"mean_experts": float(np.mean(experts)), "timed_steps": len(seconds)} | times

  return Work(run, "token", NEW * case.sequences, report, timed.pop)


def data(case: Case, variant: str) -> Work:
  """Reading, tokenising, packing and shuffling the standard library's text."""
  from moe_lab.config.program import cache_dir
  from moe_lab.data.loader import open_data

  started = time.perf_counter()
  opened = open_data(case.config().data, cache_dir())
  loader = opened.train_loader(case.batch_size)
  next(loader)
  first = time.perf_counter() - started

  def run():
    for _ in range(BATCHES):
      next(loader)

  return Work(run, "token", BATCHES * case.batch_size * case.seq_len, lambda: {"seconds_to_first_batch": first})


BENCHMARKS = {
  "train_step": train_step,
  "moe_layer": moe_layer,
  "attention": attention_layer,
  "decode": decode,
  "data": data,
}
