"""Does a wider model gain more from counts that a policy decides? Two widths, two methods, two seeds: eight runs.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=runs/widths --workers=2

The argument is what they learn:

  text  the quickstart's corpus, for as many steps (the default)
  tiny  a synthetic task, for a few steps: to try a launcher with
"""

from pathlib import Path

from moe_lab.config.load import load
from moe_lab.config.sweep import Sweep, axis, product, zipped

WHAT = ("text", "tiny")


def get_sweep(arg=None):
  what = arg or "text"
  if what not in WHAT:
    raise ValueError(f"configs/sweeps/quickstart.py:{what}: wanted one of {', '.join(WHAT)}")
  base = load(f"{Path(__file__).parents[1] / 'quickstart.py'}")
  widths, rates = (64, 128), (3e-3, 2e-3)  # a narrower model learns at a higher rate
  if what == "tiny":
    base.model.num_layers = 2
    base.model.num_experts = 4
    base.model.expert_dim = 8
    base.model.head_dim = 8
    base.routing.k_max = 4
    base.routing.warmup_steps = 4
    base.data.sources = ("synthetic:difficulty",)
    base.data.vocab_size = 27
    base.data.seq_len = 32
    base.train.steps = 16
    base.train.batch_size = 8
    base.train.log_every = 2
    base.train.eval_every = 4
    base.train.eval_batches = 2
    base.train.checkpoint_every = 4
    widths = (16, 32)
  models = zipped(
    axis("width", {f"dim{width}": {"model.dim": width} for width in widths}),
    axis("rate", {f"rate{rate:g}": {"train.learning_rate": rate} for rate in rates}),
  )
  methods = axis("method", {"topk": {"routing.method": "topk", "routing.k": 2}, "dynamic": {"routing.budget": 2.0}})
  seeds = axis("seed", {str(seed): {"train.seed": seed, "data.seed": seed} for seed in (0, 1)})
  return Sweep(base, product(models, methods, seeds))
