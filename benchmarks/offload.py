"""Plans configs/medium_50b.py for one accelerator of 24 GB: what stays, what is offloaded, what a token moves.

    python -m experiments.benchmark offload

By arithmetic, in seconds: each row is one `experiments.preflight --program=offload`. The control holds the weights in
the activations' type instead of 4 bits.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from configs import medium_50b
from moe_lab.config.adapt import AdaptConfig
from moe_lab.config.resolve import resolve
from moe_lab.preflight import residency

MEMORY, BUDGET = 24 * residency.GB, 2.0
WEIGHTS, CONTEXTS = ("nf4", "float32"), (8192, 131_072)


def report(note: Callable[[str], None]) -> list[dict]:
  """Returns `residency.report` of each form of the weights at each context, one sequence; `note` hears of progress."""
  found = []
  for weights in WEIGHTS:
    config = dataclasses.replace(resolve(medium_50b.get_config()), adapt=AdaptConfig(weights=weights))
    for context in CONTEXTS:
      note(f"planning weights in {weights} with {context:,} tokens")
      made = residency.plan(config, MEMORY, context, budget=BUDGET)
      found.append(residency.report(config, made, context, 1))
  return found


def table(found: list[dict]) -> str:
  """Returns the plans as a Markdown table; GB are 10^9 bytes."""
  head = "weights", "tokens", "other weights", "cache", "reserve", "staging", "experts that stay", "offloaded"
  rows = [(*head, "misses a token", "moved a token")]
  for one in found:
    rest = sum(one["weight_bytes"].values()) - one["weight_bytes"]["experts"]
    held = one["experts_resident"] * one["expert_bytes"]
    parts = rest, one["cache_bytes"], one["reserve_bytes"], one["staging_bytes"]
    rows.append(
      (
        one["weights"],
        f"{one['context']:,}",
        *(f"{part / residency.GB:.2f} GB" for part in parts),
        f"{one['experts_resident']} of {one['experts']}, {held / residency.GB:.2f} GB",
        f"{one['offloaded_bytes'] / residency.GB:.2f} GB",
        f"{one['missed_per_token']:.2f} of {one['taken_per_token']:.0f}",
        f"{one['moved_bytes_per_token'] / residency.GB:.3f} GB",
      )
    )
  return results.markdown(rows)


def save(folder: Path, found: list[dict], machine: dict, command: str) -> Path:
  """Writes the plans under today's date as .md and .json; returns the .md."""
  flags = f"--memory_gb={found[0]['memory_bytes'] / residency.GB:g} --budget={found[0]['budget']:g}"
  words = (
    "configs/medium_50b.py on one accelerator, one sequence, an even load of the experts, no reuse between tokens. A "
    f"row is `python -m experiments.preflight --config=configs/medium_50b.py --program=offload {flags} "
    "--context=TOKENS --config.adapt.weights=nf4`; bfloat16, the control: without the last flag. Planned: the engine "
    "decodes in this way (`experiments.generate --resident_experts`), but this model has not been run; GB are 10^9 "
    f"bytes. Reckoned on {results.in_words(machine)}"
  )
  plans = "\n\n".join(f"```\n{residency.table(one)}\n```" for one in found if one["weights"] == "nf4")
  text = f"# offload\n\n    {command}\n\n{words}\n\n{table(found)}\n\n{plans}\n"
  return results.write(folder, "offload", machine, text, {"machine": machine, "results": found})
