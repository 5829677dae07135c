"""The server under load: many clients for minutes, and what sixteen slots gain over one response at a time.

    python -m experiments.benchmark serve

The model has random weights and the sizes of a small real one: what it writes makes no sense, but takes as long as if.
First the same requests are answered in turns by a server of one slot, one after another; by one of sixteen slots, one
after another; and by that one all at once. Then clients of all kinds ask the latter for ten minutes: whole replies and
streams, completions and chat, short and long; some read slowly, some stop reading, some hang up. All of it goes over
the loopback, and the load's own work is done by the same cores.
"""

import asyncio
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import load_clients, results
from moe_lab.config import base_config
from moe_lab.config.resolve import resolve
from moe_lab.config.schema import Config
from moe_lab.data.tokenizer import train_tokenizer
from moe_lab.errors import RunError
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.files import write_text
from moe_lab.io.run import open_run
from moe_lab.report.charts import Series, line_chart
from moe_lab.report.page import escape, figure, page
from moe_lab.report.page import table as page_table
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import initial_state

SLOTS, CONTEXT = 16, 768
QUEUE = 128  # responses that may wait: all that the clients can ask for, two each
WAYS = ("one slot, one at a time", f"{SLOTS} slots, one at a time", f"{SLOTS} slots, all at once")
QUANTILES = (50, 95, 99)
SAMPLE_SECONDS = 5.0  # between two looks at the server's memory
_MOMENTS = ("first", "settled", "last")
SETTLED = 0.2  # share of the time after which memory is expected to stay: by then every buffer has been used


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured: by default what is reported.

  Attributes:
    seconds: of the load.
    clients: that ask at a time.
    requests: of each turn of the comparison.
    rounds: turns.
  """

  seconds: float = 600.0
  clients: int = 64
  requests: int = 32
  rounds: int = 2


class Served:
  """A server in a process of its own."""

  def __init__(self, workdir: Path, slots: int):
    """Starts one and waits until it answers."""
    flags = [f"--workdir={workdir}", "--port=0", f"--slots={slots}", f"--context={CONTEXT}", f"--queue={QUEUE}"]
    self.process = subprocess.Popen(
      [sys.executable, "-m", "experiments.serve", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    told = []
    for line in self.process.stderr:
      told.append(line)
      if " at http://127.0.0.1:" in line:
        break
    else:
      raise RunError(f"the server did not start: {''.join(told).strip()}")
    self.name, self.port = line.split()[0], int(line.split()[2].rstrip(",").rpartition(":")[2])

  def end(self) -> dict:
    """Returns its totals."""
    self.process.send_signal(signal.SIGTERM)
    out, err = self.process.communicate(timeout=120)
    if self.process.returncode:
      raise RunError(f"the server ended with {self.process.returncode}: {err.strip()}")
    return json.loads(out.splitlines()[-1])


def config() -> Config:
  """Returns the model's configuration: 27M parameters, 13M of them active."""
  raw = base_config()
  fields = dict(dim=512, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=8, expert_dim=256)
  for name, value in fields.items():
    setattr(raw.model, name, value)
  raw.routing.method, raw.routing.k, raw.data.vocab_size = "topk", 2, 2048
  return resolve(raw)


def write_model(workdir: Path) -> None:
  """Writes a run of random weights, with a tokenizer of the standard library's source."""
  texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
  made = config()
  tokenizer = train_tokenizer(texts, made.data.vocab_size, workdir.parent)
  with open_run(workdir, made, fingerprint=tokenizer.fingerprint, manifest=[], argv=sys.argv):
    (workdir / tokenizer.file_name).write_bytes(tokenizer.model)
    with Checkpointer(workdir, keep=1) as checkpointer:
      state = jax.jit(lambda: initial_state(made, make_optimizer(made.train)))()
      checkpointer.save(0, state, {"fingerprint": tokenizer.fingerprint})


def report(note: Callable[[str], None], plan: Plan = Plan()) -> dict:  # noqa: B008  frozen
  """Returns "turns" and "load", and the server's own "totals"; `note` hears how far it is."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder, "model")
    write_model(workdir)
    note("starting two servers")
    one, many = Served(workdir, 1), Served(workdir, SLOTS)
    try:
      turns = [_turn(one, many, plan, number, note) for number in range(plan.rounds)]
      one.end()
      note(f"{plan.clients} clients for {plan.seconds:.0f} s")
      load = asyncio.run(_load(many, plan))
      totals = many.end()
    finally:
      for server in (one, many):
        server.process.kill()
        server.process.communicate()
  return {"plan": dataclasses.asdict(plan), "turns": turns, "load": load, "totals": totals}


def _turn(one: Served, many: Served, plan: Plan, number: int, note: Callable[[str], None]) -> dict:
  """Returns tokens per second, and per second of the server's processor time, in each of the `WAYS`."""
  bodies = [load_clients.body(random.Random(1000 * number + i), "") for i in range(plan.requests)]
  turn = {}
  for name, server, at_a_time in zip(WAYS, (one, many, many), (1, 1, plan.requests), strict=True):
    began, before = time.monotonic(), asyncio.run(_figure(server, "process_cpu_seconds_total"))
    outcomes = asyncio.run(load_clients.all_of(server, bodies, at_a_time))
    if failed := [outcome for outcome in outcomes if not outcome.well]:
      raise RunError(f"{len(failed)} of {len(bodies)} requests failed, the first with status {failed[0].status}")
    tokens = sum(outcome.tokens for outcome in outcomes)
    busy = asyncio.run(_figure(server, "process_cpu_seconds_total")) - before
    turn[name] = {"per_second": tokens / (time.monotonic() - began), "per_busy_second": tokens / busy}
  note(", ".join(f"{name}: {turn[name]['per_second']:.0f} tokens/s" for name in WAYS))
  return turn


async def _figure(server: Served, name: str) -> float:
  """Returns one of the server's metrics."""
  text = await load_clients.get(server, "/metrics")
  return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


async def _load(server: Served, plan: Plan) -> dict:
  """Returns what came of the load: outcomes by kind, latencies, tokens per second, and the server's memory."""
  until = time.monotonic() + plan.seconds
  memory = asyncio.ensure_future(_memory(server, plan.seconds))
  began = time.monotonic()
  outcomes = await load_clients.until(server, plan.clients, until)
  seconds = time.monotonic() - began
  samples = await memory
  kept = [outcome for outcome in outcomes if outcome.kind in load_clients.KEPT]
  streams = [outcome for outcome in kept if outcome.first_seconds is not None and outcome.kind == "stream"]
  return {
    "seconds": seconds,
    "requests": len(outcomes),
    "by_kind": {kind: sum(o.kind == kind for o in outcomes) for kind in load_clients.KINDS},
    "failed": [outcome._asdict() for outcome in outcomes if not outcome.well],
    "tokens": sum(outcome.tokens for outcome in outcomes),
    "tokens_per_second": sum(outcome.tokens for outcome in outcomes) / seconds,
    "seconds_to_first_token": _quantiles([outcome.first_seconds for outcome in streams]),
    "seconds_of_a_reply": _quantiles([outcome.seconds for outcome in kept if outcome.kind in ("whole", "stream")]),
    "memory": samples,
    **_flatness(samples),
  }


def _quantiles(values: list[float]) -> dict[str, float]:
  if len(values) < 2:
    return {}
  cuts = statistics.quantiles(values, n=100, method="inclusive")
  return {f"p{q}": cuts[q - 1] for q in QUANTILES}


async def _memory(server: Served, seconds: float) -> list[tuple[float, float]]:
  """Returns (seconds, resident MiB) of the server over time, by its own metrics."""
  began, samples = time.monotonic(), []
  while (now := time.monotonic() - began) < seconds:
    samples.append((now, await _figure(server, "process_resident_memory_bytes") / 2**20))
    await asyncio.sleep(min(SAMPLE_SECONDS, seconds / 4))
  return samples


def _flatness(samples: list[tuple[float, float]]) -> dict:
  """Returns first, settled and last MiB, and the slope of those that are settled, in MiB a minute."""
  settled = [sample for sample in samples if sample[0] >= SETTLED * samples[-1][0]]
  slope = statistics.linear_regression(*zip(*settled, strict=True)).slope * 60 if len(settled) > 1 else None
  first, last = samples[0][1], samples[-1][1]
  return {"first_mib": first, "settled_mib": settled[0][1], "last_mib": last, "slope_mib_per_minute": slope}


def tables(found: dict) -> list[list[tuple[str, ...]]]:
  """Returns the rows of two tables, their titles first."""
  turns = [("turn, measure", *WAYS, "over one slot", "over one at a time")]
  for number, turn in enumerate(found["turns"], 1):
    for measure, words in (("per_second", "tokens/s"), ("per_busy_second", "tokens per second of processor time")):
      one, of_many, many = values = [turn[way][measure] for way in WAYS]
      gains = f"{many / one:.2f}", f"{many / of_many:.2f}"
      turns.append((f"{number}, {words}", *(f"{value:.0f}" for value in values), *gains))
  load = found["load"]
  first, whole = load["seconds_to_first_token"], load["seconds_of_a_reply"]
  rows = [("under load", "")]
  rows += [(f"requests: {kind}", str(number)) for kind, number in load["by_kind"].items()]
  rows += [
    ("failed requests", str(len(load["failed"]))),
    ("tokens per second", f"{load['tokens_per_second']:.0f}"),
    ("to the first token, p50, p95, p99", _seconds(first)),
    ("of a whole reply, p50, p95, p99", _seconds(whole)),
    ("memory at first, settled, at last", " / ".join(f"{load[f'{at}_mib']:.0f}" for at in _MOMENTS) + " MiB"),
    ("slope of it, once settled", f"{load['slope_mib_per_minute']:+.2f} MiB a minute"),
  ]  # fmt: skip
  return [turns, rows]


def _seconds(quantiles: dict[str, float]) -> str:
  return " / ".join(f"{value:.2f}" for value in quantiles.values()) + " s"


def save(folder: Path, found: dict, machine: dict, command: str) -> Path:
  """Writes the report under today's date as .md, .json and, drawn, .html; returns the .md."""
  plan = found["plan"]
  words = (
    f"A model of random weights, 27M parameters, 13M of them active. {plan['requests']} requests a turn; then "
    f"{plan['clients']} clients for {plan['seconds']:.0f} s, after which the server took SIGTERM and exited with 0. "
    "A request counts as failed unless its client has read a complete answer or left of its own accord. Clients and "
    f"server share the cores; {os.getloadavg()[1]:.1f} processes wanted them over the last five minutes. "
    f"{results.in_words(machine)}"
  )
  found_tables = tables(found)
  markdown = "\n\n".join(map(results.markdown, found_tables))
  text = f"# serve\n\n    {command}\n\n{words}\n\n{markdown}\n"
  path = results.write(folder, "serve", machine, text, {"machine": machine, "results": found})
  minutes = [(second / 60, mib) for second, mib in found["load"]["memory"]]
  drawing = line_chart(
    [Series("resident memory of the server", minutes, 1)], title="Memory under load", x_label="minutes", y_label="MiB",
    include_zero=True,
  )  # fmt: skip
  body = figure(drawing, words) + "".join(page_table(rows[0], rows[1:]) for rows in found_tables)
  write_text(path.with_suffix(".html"), page("The server under load", f"<p><code>{escape(command)}</code></p>",
                                             [("Load", body)]))  # fmt: skip
  return path
