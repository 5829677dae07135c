"""The cost benchmark's table, drawings and dated files."""

from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from benchmarks.cost import ENOUGH, NEW
from moe_lab.evaluate.energy import NOT_MEASURABLE
from moe_lab.io.files import write_text
from moe_lab.report.charts import Series, line_chart
from moe_lab.report.page import escape, figure, page, table
from moe_lab.report.scatter import Family, Mark, scatter_chart

BUSY = 0.1  # of the cores at rest: from here on the reader is told first


def rows(found: dict) -> list[tuple[str, ...]]:
  """Returns the table of all cells, its head first; prices and energy where there are any."""
  head = ["who", "asked", "clients", "experts", "p50, ms", "p95, ms", "p99, ms", "first p50, ms", "first p99, ms"]
  head += ["tokens/s", "MFLOP/token", "GFLOP/s", "of peak", "device-hours/M tokens"]
  further = {
    "price_per_million_tokens": "price/M tokens",
    "joules_per_response": "J/response",
    "joules_above_idle_per_response": "of it above rest",
    "grams_co2_per_response": "g CO2/response",
  }
  further = {name: title for name, title in further.items() if found["cells"][0].get(name) is not None}
  return [(*head, *further.values())] + [
    (
      cell["who"],
      f"{cell['budget']:g}",
      str(cell["clients"]),
      f"{cell['experts']:.2f}",
      *_milliseconds(cell["latency_ms"]),
      *_milliseconds({p: cell["first_token_ms"][p] for p in ("p50", "p99")}),
      f"{cell['tokens_per_second']:,.0f}",
      f"{cell['flops_per_token'] / 1e6:,.1f}",
      f"{cell['flops_per_second'] / 1e9:,.1f}",
      f"{cell['of_peak']:.1%}",
      f"{cell['device_hours_per_million_tokens']:.3g}",
      *(f"{cell[name]:.3g}" for name in further),
    )
    for cell in found["cells"]
  ]


def kinds(found: dict) -> list[tuple[str, ...]]:
  """Returns the table of easy and hard prompts, at the most clients."""
  most = found["settings"]["concurrency"]
  head = ("who", "asked", "prompts", "responses", "experts", "p50, ms", "p95, ms", "p99, ms")
  return [head] + [
    (
      cell["who"],
      f"{cell['budget']:g}",
      kind,
      str(of_kind["responses"]),
      f"{of_kind['experts']:.2f}",
      *_milliseconds(of_kind["latency_ms"]),
    )
    for cell in found["cells"]
    if cell["clients"] == most
    for kind, of_kind in cell["by_kind"].items()
    if of_kind
  ]


def _milliseconds(percentiles: dict[str, float]) -> list[str]:
  return [f"{value:,.0f}" for value in percentiles.values()]


def words(found: dict, machine: dict) -> list[str]:
  """Returns what has to be known to read the figures: plain sentences, a paragraph each."""
  settings, energy, losses = found["settings"], found["energy"], found["prompt_losses"]
  count = min(cell["responses"] for cell in found["cells"])
  told = [
    f"{results.in_words(machine)} Dense matmul peak in the same run: {found['dense_matmul_gflops']:,.0f} GFLOP/s.",
    f"Served: {found['model']}. All contenders have its weights: its own counts, these in steady mode, and fixed "
    f"top-k. Prompts of {found['prompt_tokens']} held-out tokens, by turns an easy one (the model's loss on it is "
    f"{losses['easy']:.2f} nats on average) and a hard one ({losses['hard']:.2f}); responses of {NEW} tokens, sampled. "
    f"The engine has {settings['concurrency']} slots throughout. Each client asks again as soon as it is answered.",
    f"Of each row {count} responses over {settings['rounds']} rounds, by turns, after one of each client that does not "
    'count. Latencies are those of all responses together, from submission to the last token; "first": to the first. '
    "Tokens/s are the median round's, reading the prompts included. FLOPs by moe_lab/evaluate/flops.py, of a generated "
    "token; GFLOP/s with the prompts'.",
  ]
  if count < ENOUGH:
    told.append(f"Fewer than {ENOUGH} responses a row: p99 is hardly more than the slowest of them.")
  told.append(_energy(energy, settings))
  if settings["price_per_hour"] is not None:
    told.append(f"Prices at {settings['price_per_hour']:g} for an hour of the device, in its currency.")
  busy = [share for share in found["busy_at_rest"] if share is not None]
  if busy and max(busy) >= BUSY:
    shares = " and ".join(f"{share:.0%}" for share in busy)
    told.append(
      f"Other programs computed on this machine: {shares} of its cores' time before and after, while this one slept. "
      "Rows took turns and can be compared; on a machine of its own all are faster."
    )
  return told


def _energy(energy: dict, settings: dict) -> str:
  if not energy["counters"]:
    return f"Energy and carbon: {NOT_MEASURABLE} ({energy['reason']})."
  text = f"Energy by {', '.join(energy['counters'])}, whole devices, the machine's rest included: "
  text += f"{energy['idle_watts']:.1f} W." if energy["idle_watts"] is not None else f"{NOT_MEASURABLE}."
  if energy["left_out"]:
    text += f" Not counted: {energy['left_out']}."
  if settings["grid_g_per_kwh"] is not None:
    text += f" Carbon for a grid of {settings['grid_g_per_kwh']:g} g CO2 equivalent a kWh."
  return text


def charts(found: dict) -> list[tuple[str, str]]:
  """Returns drawings with captions: latency against clients, and cost against experts."""
  cells, first = found["cells"], found["settings"]["budgets"][0]
  names = list(dict.fromkeys(cell["who"] for cell in cells))
  swept = [cell for cell in cells if cell["budget"] == first]
  drawn = []
  for p in ("p50", "p95", "p99"):
    series = [
      Series(name, [(c["clients"], c["latency_ms"][p]) for c in swept if c["who"] == name], number, "dots")
      for number, name in enumerate(names, 1)
    ]
    drawing = line_chart(
      series, title=f"{p} of the latency", x_label="clients at a time", y_label=f"{p}, ms", include_zero=True
    )
    drawn.append((drawing, f"{p} of a response's latency, {first:g} experts asked for."))
  most = [cell for cell in cells if cell["clients"] == found["settings"]["concurrency"]]

  def against_experts(value: Callable[[dict], float | None], unit: str, caption: str) -> None:
    if any(value(cell) is None for cell in most):
      return
    families = [
      Family(
        name,
        [Mark(c["experts"], value(c), None, f"{name}, {c['experts']:.2f} experts: {value(c):.3g} {unit}") for c in most
         if c["who"] == name],
        number,
      )
      for number, name in enumerate(names)
    ]  # fmt: skip
    drawn.append(
      (scatter_chart(families, title=caption, x_label="mean experts per token", y_label=unit), caption + ".")
    )

  clients = f"with {found['settings']['concurrency']} clients"
  against_experts(lambda c: c["latency_ms"]["p99"], "ms", f"p99 of a response's latency against experts, {clients}")
  if found["settings"]["price_per_hour"] is not None:
    against_experts(lambda c: c["price_per_million_tokens"], "price", f"Price of a million tokens, {clients}")
  else:
    hours = "device-hours"
    against_experts(lambda c: c["device_hours_per_million_tokens"], hours, f"Time of a million tokens, {clients}")
  against_experts(lambda c: c["joules_per_response"], "J", f"Energy of a response, {clients}")
  return drawn


def save(folder: Path, found: dict, machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md, .json and, drawn, .html; returns the .md."""
  told, tables = words(found, machine), (rows(found), kinds(found))
  text = "\n\n".join(["# cost", f"    {command}", *told, *map(results.markdown, tables)]) + "\n"
  path = results.write(folder, "cost", machine, text, {"machine": machine, "command": command} | found)
  head = f"<p><code>{escape(command)}</code></p>" + "".join(f'<p class="soft">{escape(one)}</p>' for one in told)
  drawings = "".join(f"<div>{figure(*one)}</div>" for one in charts(found))
  sections = [("Drawn", f'<div class="pair">{drawings}</div>')]
  for name, (top, *body), columns in (("All", tables[0], 1), ("Easy and hard prompts", tables[1], 3)):
    cells = [[escape(cell) for cell in row] for row in body]
    sections.append((name, table(top, cells, text_columns=columns)))
  write_text(path.with_suffix(".html"), page("What a response costs", head, sections))
  return path
