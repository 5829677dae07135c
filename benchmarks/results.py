"""From measurements to a table, a result and a dated file."""

import dataclasses
import datetime
from pathlib import Path

from benchmarks.measure import Result
from moe_lab.io.files import dump_json, write_text


def table(results: list[Result], peak: float) -> str:
  """Returns the results as a Markdown table."""
  rows = [("case", "who", "median", "quartiles", "units/s", "GFLOP/s", "of peak", "memory", "experts", "p50", "p99")]
  timed = any("p50_ms" in r.numbers for r in results)
  for r in results:
    flops = r.flops_per_second
    rows.append(
      (
        r.case,
        r.name,
        f"{r.seconds * 1e3:.1f} ms",
        f"{r.low * 1e3:.1f}..{r.high * 1e3:.1f}",
        f"{r.per_second:,.0f} {r.unit}s",
        f"{flops / 1e9:,.1f}" if flops else "-",
        f"{flops / peak:.0%}" if flops else "-",
        f"{r.peak_bytes / 2**20:,.0f} MiB",
        f"{r.numbers['mean_experts']:.2f}" if "mean_experts" in r.numbers else "-",
        *(f"{r.numbers[q]:.2f} ms" if q in r.numbers else "-" for q in ("p50_ms", "p99_ms")),
      )
    )
  return markdown(rows if timed else [row[:-2] for row in rows])


def summary(benchmark: str, results: list[Result], peak: float, machine: dict) -> dict:
  """Returns the result of a benchmark: ours, peers, ratio, unit, machine, and every figure under "results".

  `ratio` is ours over the fastest peer in its usual setting, case by case; a peer with another setting of the
  allocator is listed, not compared with.
  """
  ours = [r for r in results if r.side == "ours"]
  peers = [r for r in results if r.side == "peer"]
  ratio = {}
  for case in dict.fromkeys(r.case for r in ours):
    rivals = [r.per_second for r in peers if r.case == case and r.rival]
    if rivals:
      ratio[case] = max(r.per_second for r in ours if r.case == case) / max(rivals)
  return {
    "benchmark": benchmark,
    "ours": {f"{r.name}: {r.case}": r.per_second for r in ours},
    "peers": {f"{r.name}: {r.case}": r.per_second for r in peers},
    "ratio": ratio,
    "unit": f"{results[0].unit}s per second",
    "machine": machine,
    "dense_matmul_gflops": peak / 1e9,
    "results": [dataclasses.asdict(r) for r in results],
  }


def markdown(rows: list[tuple[str, ...]]) -> str:
  """Returns rows, the first of them the head, as a Markdown table."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
  lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
  return "\n".join(lines)


def write(folder: Path, name: str, machine: dict, text: str, data: dict) -> Path:
  """Writes text as .md and data as .json under today's date, never over an older file; returns the .md."""
  device = (machine["accelerator"] or f"cpu{machine['cores']}").lower().replace(" ", "-")
  stem = f"{datetime.date.today().isoformat()}-{name}-{device}"
  folder.mkdir(parents=True, exist_ok=True)
  number, path = 1, folder / f"{stem}.md"
  while path.exists():
    number += 1
    path = folder / f"{stem}-{number}.md"
  write_text(path, text)
  write_text(path.with_suffix(".json"), dump_json(data) + "\n")
  return path


def in_words(machine: dict) -> str:
  """Returns the machine in one sentence."""
  versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
  accelerator = machine["accelerator"] or "no accelerator"
  return f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {accelerator}; {versions}."


def save(folder: Path, name: str, text: str, result: dict, command: str) -> Path:
  """Writes NAME under today's date as .md (the table) and .json; never over an older file. Returns the .md."""
  words = [
    f"# {name}, {datetime.date.today().isoformat()}",
    f"    {command}",
    f"{in_words(result['machine'])} Dense matmul peak in the same run: {result['dense_matmul_gflops']:,.0f} GFLOP/s.",
    text,
  ]
  if result["ratio"]:
    words.append("\n".join(f"- {case}: {value:.2f} times the faster peer" for case, value in result["ratio"].items()))
  return write(folder, name, result["machine"], "\n\n".join(words) + "\n", result)
