"""A made-up run whose page shows everything."""

import json
import math
import random
import time

from moe_lab.config import Config, ModelConfig, RoutingConfig, TrainConfig
from moe_lab.io.run import open_run
from moe_lab.io.writers import MetricsWriter

TEXT = '''def load(path: str, *, encoding="utf-8") -> dict[str, int]:
  """Reads the table <b>at</b> `path` & returns its counts.

  A line holds a word and a number; an empty line ends the table.
  """
  counts = {}
  with open(path, encoding=encoding) as file:
    for line in file:
      if not line.strip():
        break
      word, number = line.rsplit(maxsplit=1)
      counts[word] = counts.get(word, 0) + int(number)
  return counts
'''


def write_run(workdir, *, method="dynamic", steps=1000, layers=4, experts=16, evaluated=True, seed=0):
  """Writes the records of a run of `steps` steps; 0 is one that was only started."""
  rng = random.Random(seed)
  config = Config(
    model=ModelConfig(num_layers=layers, num_experts=experts),
    routing=RoutingConfig(method=method),
    train=TrainConfig(steps=max(steps, 1)),
  )
  manifest = [{"source": "stdlib", "file": f"lib/file_{i}.py", "documents": i, "sha256": "ab" * 32} for i in range(5)]
  open_run(
    workdir, config, fingerprint="a1" * 32, manifest=manifest, argv=["experiments/train.py", "--config=<x>"]
  ).close()
  histogram, load = _histogram(rng, layers), _load(rng, layers, experts)
  with MetricsWriter(workdir) as writer:
    for step in range(10, steps + 1, 10):
      done = step / steps
      record = {
        "kind": "train",
        "step": step,
        "time": time.time() + step / 3,
        "tokens": step * 4096,
        "flops": step * 4096 * 2.4e6,
        "loss": 2.9 + 4.6 * math.exp(-5 * done) + rng.gauss(0, 0.08),
        "mean_experts": 2 + 2.4 * math.exp(-9 * done) + rng.gauss(0, 0.03),
        "learning_rate": 2e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 12_345 + rng.gauss(0, 200),
        "load": load,
      }
      if method == "dynamic":
        record |= {
          "greedy_experts": 1.9 + 2.1 * math.exp(-7 * done) + rng.gauss(0, 0.05),
          "budget": 2.0,
          "price": 0.05 * (1 - math.exp(-6 * done)) - 0.01 * math.sin(9 * done),
          "policy_entropy": 0.4 + 1.6 * math.exp(-4 * done),
          "k_histogram": histogram,
        }
      writer.write(record)
      if step % 200 == 0:
        writer.write(
          {
            "kind": "eval",
            "step": step,
            "tokens": step * 4096,
            "flops": step * 4096 * 2.4e6,
            "val_loss": 3.05 + 4.4 * math.exp(-5 * done),
            "mean_experts": 1.97 + 1.5 * math.exp(-8 * done),
          }
        )
  if evaluated and steps:
    final = {
      "split": "test",
      "val_loss": 3.08,
      "test_loss": 3.11,
      "val_bits_per_byte": 1.61,
      "test_bits_per_byte": 1.62,
      "bigram_loss": 4.21,
      "bigram_bits_per_byte": 2.19,
      "bigram_test_loss": 4.26,
      "bigram_test_bits_per_byte": 2.23,
      "budget": 2.0,
      "mean_experts": 1.98,
      "flops_per_token": 8.1e5,
      "by_class": {
        name: {"tokens": 9000 // rank, "loss": 4.0 / rank, "mean_experts": 1 + 2.2 / rank}
        for rank, name in enumerate(["identifier", "number", "word", "punctuation", "space"], 1)
      },
      "k_histogram": histogram,
      "load": load,
      "passage": _passage(rng, layers),
    }
    (workdir / "evaluation.json").write_text(json.dumps(final))
  return workdir


def _passage(rng, layers):
  tokens, at = [], 0
  while at < len(TEXT):
    end = at + rng.choice([1, 2, 3, 4, 5])
    text = TEXT[at:end]
    counts = [min(8, 1 + int(rng.expovariate(0.9 if text.strip().isalpha() else 2))) for _ in range(layers)]
    tokens.append(
      {
        "text": text,
        "experts": sum(counts) / layers,
        "experts_by_layer": counts,
        "loss": rng.expovariate(0.5) if at else None,
      }
    )
    at = end
  return tokens


def _histogram(rng, layers):
  rows = []
  for layer in range(layers):
    raw = [0.0] + [math.exp(-0.8 * k + 0.12 * layer * k) * rng.uniform(0.7, 1.3) for k in range(8)]
    rows.append([share / sum(raw) for share in raw])
  return rows


def _load(rng, layers, experts):
  rows = []
  for layer in range(layers):
    raw = [rng.lognormvariate(0, 0.35) for _ in range(experts)]
    if layer == 1:
      raw[3] = 0.0
    rows.append([share / sum(raw) for share in raw])
  return rows
