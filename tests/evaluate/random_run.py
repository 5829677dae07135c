"""A run with a tokenizer and random weights, for any budget from 1 to 4."""

import sysconfig
from pathlib import Path

import jax
import numpy as np

from moe_lab.config.schema import Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.data.tokenizer import train_tokenizer
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.run import open_run
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state

_MODULES = ("textwrap", "heapq", "bisect", "calendar", "colorsys", "csv", "queue", "sched", "shlex", "string")
VOCAB, CONTEXT = 500, 48


def texts():
  """Returns some texts."""
  return [Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]


def random_run(workdir, cache):
  """Writes a run and returns its directory; the tokenizer is kept in `cache`."""
  tokenizer = train_tokenizer(texts(), VOCAB, cache)
  config = Config(
    ModelConfig(dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=6, expert_dim=10),
    RoutingConfig(k_max=4, budget_range=(1.0, 4.0)),
    DataConfig(vocab_size=VOCAB, seq_len=CONTEXT),
  )
  state = jax.jit(lambda: initial_state(config, make_optimizer(config.train)))()
  rng = np.random.default_rng(1)

  def drawn(leaf):  # large enough that texts differ, and counts too
    return (1.5 * rng.normal(size=leaf.shape) * config.model.dim**-0.5).astype(np.float32) if leaf.ndim > 2 else leaf

  params = jax.tree.map(drawn, state.params)
  # No byte is ever likeliest: libraries write bytes that are not UTF-8 differently.
  is_byte_V = np.array([piece.startswith("<0x") for piece in tokenizer.piece_texts()])
  params["head_VD"] = 2 * np.asarray(params["head_VD"]) * ~is_byte_V[:, None]
  record = dict(fingerprint=tokenizer.fingerprint, manifest=[], argv=["train"])
  with open_run(workdir, config, **record), Checkpointer(workdir, 1) as checkpointer:
    (workdir / "tokenizer.model").write_bytes(tokenizer.model)
    checkpointer.save(1, state._replace(params=params), {})
  return workdir
