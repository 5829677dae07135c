"""One layer's attention over contexts so long that its windows decide the cost: time, memory, blocks, cache.

    python -m experiments.benchmark long_attention

Heads and bound (`SHAPE`) are those of the 50B preset, with one query head a KV group. Each row is a process of its own.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import results
from benchmarks.worker import own_stdout, resident
from configs import medium_50b
from moe_lab.config.program import keep_freed_memory
from moe_lab.config.resolve import resolve
from moe_lab.config.schema import ModelConfig
from moe_lab.errors import RunError
from moe_lab.infer.cache import cache_bytes, full_cache_bytes
from moe_lab.io.files import write_text
from moe_lab.nn.attention import layer_slopes, layer_windows
from moe_lab.nn.layers import rms_normalise
from moe_lab.ops.attention import attention
from moe_lab.ops.blocked_attention import blocks_visited
from moe_lab.report.charts import Series, line_chart
from moe_lab.report.page import escape, figure, page

_PRESET = resolve(medium_50b.get_config()).model
SHAPE = dataclasses.replace(_PRESET, num_layers=1, num_heads=_PRESET.num_kv_heads, dtype="float32")
LENGTHS = (16_384, 32_768, 65_536, 131_072, 262_144)
UNSKIPPED = 131_072  # the longest context that is measured without skipping: seven minutes on two cores
CHUNK = 512  # of prefill, which the rings of the cache have room for
BLOCK = 64
RUNS = 3  # timed ones, after one that finds the memory cold
LONG = 15.0  # seconds: what the first run takes longer than is measured by that alone


@dataclasses.dataclass(frozen=True)
class Row:
  """What one process measures.

  Attributes:
    length: L, of queries and keys.
    num_global_groups: of eight KV groups, those that see everything.
    skip: whether keys beyond the windows are left out.
  """

  length: int
  num_global_groups: int
  skip: bool

  @property
  def config(self) -> ModelConfig:
    return dataclasses.replace(SHAPE, num_global_groups=self.num_global_groups)

  @property
  def name(self) -> str:
    """Who is measured, whatever the length."""
    groups = f"{self.num_global_groups} of {SHAPE.num_kv_heads} groups global"
    return groups if self.skip else "nothing skipped"


def rows() -> list[Row]:
  """Returns what is measured, the shortest first. Without skipping the slopes make no difference to the time."""
  found = []
  for length in LENGTHS:
    found += [Row(length, num_global_groups, True) for num_global_groups in (0, 1)]
    if length <= UNSKIPPED:
      found.append(Row(length, 1, False))
  return found


def measure(row: Row) -> dict:
  """Times one row in this process.

  Returns:
    "forward_seconds" and "both_seconds" (forward and backward, together); "forward_bytes" and "both_bytes", the most
    that the process held above its start: q, k, v, the output and, of both, four gradients are in it.
  """
  keep_freed_memory()
  shape = (1, row.length, SHAPE.num_heads, SHAPE.head_dim)
  slope_M = jnp.asarray(layer_slopes(row.config))
  window_M = layer_windows(row.config) if row.skip else None
  segments = jnp.ones(shape[:2], jnp.int32)

  def attended(q, k, v):
    return attention(q, k, v, slope_M, segments, segments, window_M=window_M, block=BLOCK)

  def both(q, k, v, d_out):
    out, back = jax.vjp(attended, q, k, v)
    return out, back(d_out)

  start = resident()

  @jax.jit
  def inputs(key):
    q, k, v = (jax.random.normal(one, shape) for one in jax.random.split(key, 3))
    limit = (SHAPE.qk_bound * SHAPE.head_dim**-0.5) ** 0.5  # as QK-norm's largest gain
    return rms_normalise(q) * limit, rms_normalise(k) * limit, v

  q, k, v = jax.block_until_ready(inputs(jax.random.key(0)))
  forward_seconds = _time(attended, (q, k, v))
  forward_bytes = resident() - start
  both_seconds = _time(both, (q, k, v, v))  # any array of that shape is a gradient
  return {
    "forward_seconds": forward_seconds,
    "both_seconds": both_seconds,
    "forward_bytes": forward_bytes,
    "both_bytes": resident() - start,
  }


def _time(function: Callable, arguments: tuple) -> float:
  """The median of several runs, or a long one's own time; compiling is not in it."""
  run = jax.jit(function).lower(*arguments).compile()
  seconds = []
  while len(seconds) <= RUNS:
    started = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    seconds.append(time.perf_counter() - started)
    if seconds[0] > LONG:
      return seconds[0]
  return statistics.median(seconds[1:])


def blocks(row: Row) -> list[dict]:
  """Returns for each KV group its slope, window, and the blocks of logits that are computed and skipped."""
  slopes, windows = layer_slopes(row.config), layer_windows(row.config)
  causal = blocks_visited(row.length, row.length, None, block=BLOCK)
  found = []
  for slope, window in zip(slopes.tolist(), windows, strict=True):
    visited = blocks_visited(row.length, row.length, window, block=BLOCK)
    found.append({"slope": slope, "window": window, "visited": visited, "skipped": causal - visited})
  return found


def report(note: Callable[[str], None]) -> dict:
  """Measures all rows, each in a process of its own, one after the other.

  Returns:
    "rows", "ratios" (time without skipping over time with it, and memory of twice the length over that of half),
    "blocks" by KV group and "cache" in bytes, of the longest contexts.

  Raises:
    RunError: a process failed.
  """
  measured = []
  for row in rows():
    note(f"{row.length:,} tokens, {row.name}")
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.long_attention", json.dumps(dataclasses.asdict(row))],
      stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
      raise RunError(f"{row.name} at {row.length:,} tokens failed: exit {done.returncode}")
    measured.append({"name": row.name, **dataclasses.asdict(row), **json.loads(done.stdout)})
    note(f"  forward {measured[-1]['forward_seconds']:.3g} s, both {measured[-1]['both_seconds']:.3g} s")
  return {
    "rows": measured,
    "ratios": _ratios(measured),
    "blocks": {str(n): blocks(Row(LENGTHS[-1], n, True)) for n in (0, 1)},
    "cache": [_cache(length, n) for length in LENGTHS[-2:] for n in (0, 1)],
  }


def _ratios(measured: list[dict]) -> list[dict]:
  at = {(row["length"], row["num_global_groups"], row["skip"]): row for row in measured}
  found = []
  for (length, groups, skip), row in at.items():
    entry = {"length": length, "num_global_groups": groups, "skip": skip}
    if skip and (all_of_it := at.get((length, 1, False))):
      for what in ("forward", "both"):
        entry[f"{what}_times_faster"] = all_of_it[f"{what}_seconds"] / row[f"{what}_seconds"]
    if half := at.get((length // 2, groups, skip)):
      entry["memory_over_half_the_length"] = row["both_bytes"] / max(half["both_bytes"], 1)
    found.append(entry)
  return found


def _cache(length: int, num_global_groups: int) -> dict:
  config = Row(length, num_global_groups, True).config
  kept, full = cache_bytes(config, 1, length, CHUNK), full_cache_bytes(config, 1, length)
  return {"length": length, "num_global_groups": num_global_groups, "bytes": kept, "full_bytes": full}


def save(folder: Path, found: dict, machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md, .json and, drawn, .html; returns the .md."""
  text = "\n\n".join((_times(found), _groups(found), _caches(found)))
  words = [
    f"# long_attention, {SHAPE.num_heads} heads of {SHAPE.head_dim}, S {SHAPE.qk_bound:g}, float32, batch 1",
    f"    {command}",
    f'{results.in_words(machine)} "Both" is forward and backward. Memory is what a process held above its libraries.',
    text,
  ]
  data = {"machine": machine, "command": command} | found
  path = results.write(folder, "long_attention", machine, "\n\n".join(words) + "\n", data)
  drawings = "".join(
    figure(_drawing(found, f"{what}_seconds", label), label + ".")
    for what, label in (("forward", "Forward"), ("both", "Forward and backward"))
  )
  body = drawings + f"<pre>{escape(text)}</pre>"
  head = f"<p><code>{escape(command)}</code></p>"
  write_text(path.with_suffix(".html"), page("Attention over long contexts", head, [("Time", body)]))
  return path


def _drawing(found: dict, field: str, label: str) -> str:
  names = list(dict.fromkeys(row["name"] for row in found["rows"]))
  series = [
    Series(name, [(row["length"], row[field]) for row in found["rows"] if row["name"] == name], index, "dots")
    for index, name in enumerate(names, 1)
  ]
  return line_chart(series, title=label, x_label="tokens", y_label="seconds", include_zero=True)


def _times(found: dict) -> str:
  table = [
    (
      "tokens",
      "KV groups",
      "forward",
      "both",
      "memory",
      "of half the length",
      "forward, times faster",
      "both, times faster",
    )
  ]
  for row, ratio in zip(found["rows"], found["ratios"], strict=True):
    table.append((
      f"{row['length']:,}", row["name"], f"{row['forward_seconds']:.2f} s", f"{row['both_seconds']:.2f} s",
      f"{row['both_bytes'] / 2**20:,.0f} MiB",
      *(
        f"{ratio[key]:.2f}" if key in ratio else "-"
        for key in ("memory_over_half_the_length", "forward_times_faster", "both_times_faster")
      ),
    ))  # fmt: skip
  return results.markdown(table)


def _groups(found: dict) -> str:
  table = [("global groups", "slope", "window", "blocks computed", "blocks skipped")]
  for groups, entries in found["blocks"].items():
    for entry in entries:
      window = "all" if entry["window"] is None else f"{entry['window']:,}"
      table.append((groups, f"{entry['slope']:.5f}", window, f"{entry['visited']:,}", f"{entry['skipped']:,}"))
  return results.markdown(table)


def _caches(found: dict) -> str:
  table = [("cache of a layer, tokens", "global groups", "kept", "all", "times less")]
  for entry in found["cache"]:
    kept, full = entry["bytes"] / 2**20, entry["full_bytes"] / 2**20
    table.append(
      (
        f"{entry['length']:,}",
        str(entry["num_global_groups"]),
        f"{kept:,.1f} MiB",
        f"{full:,.0f} MiB",
        f"{full / kept:.1f}",
      )
    )
  return results.markdown(table)


if __name__ == "__main__":
  answers = own_stdout()
  print(json.dumps(measure(Row(**json.loads(sys.argv[1])))), file=answers)
