"""Latency, throughput, energy and price of responses, from one client to many, with dynamic and with fixed counts.

    python -m experiments.benchmark cost
    python -m experiments.benchmark cost --workdir=runs/any --k=2,1,4 --concurrency=16 --price_per_hour=2.5

Contenders have the same weights: the model's own counts, those with the engine's steady mode, and a fixed number of
experts. They take turns, at every number of clients of the first budget, and at the most clients of the others.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import machine, ours
from benchmarks.closed_loop import ClosedLoop, Window
from benchmarks.measure import PEAK_SIZES
from benchmarks.served import Prompts, Served, with_fixed_count
from benchmarks.worker import timed
from moe_lab.evaluate import cost
from moe_lab.evaluate.energy import Energy, EnergyMeter
from moe_lab.infer.engine import Engine

NEW = 100  # tokens of a response
STEPS = 4  # tokens that the engine makes between two looks
SAMPLING = {"max_tokens": NEW, "temperature": 0.8, "top_p": 0.95}
ENOUGH = 100  # responses that a p99 wants
PERCENTILES = (50, 95, 99)
AT_REST = 2.0  # seconds for which the machine is watched while this program sleeps


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is to be measured.

  Attributes:
    budgets: mean experts to ask for; the first at every number of clients.
    concurrency: the most clients.
    responses: of each cell, over all rounds.
    rounds: turns of each cell.
    price_per_hour: of one device, in any currency; None: no price is told.
    grid_g_per_kwh: CO2 equivalent that the grid emits; None: it is not told.
  """

  budgets: tuple[float, ...]
  concurrency: int
  responses: int
  rounds: int
  price_per_hour: float | None = None
  grid_g_per_kwh: float | None = None


class Cell(NamedTuple):
  """What is measured by turns: a contender, what is asked of it, and by how many clients."""

  who: str
  budget: float
  clients: int
  engine: Engine


def levels(most: int) -> list[int]:
  """Returns 1, 2, 4 ... and the most clients."""
  return [*(1 << i for i in range((most - 1).bit_length())), most]


def cells(model: Served, length: int, settings: Settings) -> list[Cell]:
  """Returns what is measured; contenders of the same budget and number of clients come one after the other."""

  def engine(config, **arguments) -> Engine:
    capacity = length + NEW
    slots = settings.concurrency
    return Engine(config, model.params, model.router_state, slots=slots, capacity=capacity, steps=STEPS, **arguments)

  routing, free, found = model.config.routing, None, []
  for index, budget in enumerate(settings.budgets):
    contenders = {}
    if not routing.fixed:
      free = free or engine(model.config)
      contenders |= {
        routing.method: free,
        f"{routing.method}, steady": engine(model.config, steady=True, budget=budget),
      }
    if budget == int(budget):
      contenders["fixed"] = engine(with_fixed_count(model.config, int(budget)))
    for clients in levels(settings.concurrency) if index == 0 else [settings.concurrency]:
      found += [Cell(who, budget, clients, engine) for who, engine in contenders.items()]
  return found


def report(model: Served, prompts: Prompts, settings: Settings, note: Callable[[str], None]) -> dict:
  """Measures all cells by turns.

  Args:
    model: to serve.
    prompts: to ask it with.
    settings: what to measure.
    note: is told about progress.

  Returns:
    "cells", and what they were measured with.
  """
  meter = EnergyMeter(jax.default_backend())
  measured = cells(model, prompts.tokens.shape[1], settings)
  windows: list[list[tuple[Window, Energy]]] = [[] for _ in measured]
  for cell in {id(cell.engine): cell for cell in measured}.values():
    note(f"compiling {cell.who}, {cell.budget:g} experts")
    cell.engine.warm_up()
  idle = [_at_rest(meter)]
  peaks = [_peak(model.config.model.dtype)]
  # As many in every round, so that a round's rate is as good as another's.
  responses = -(-settings.responses // settings.rounds)
  for turn in range(settings.rounds):
    for cell, taken in zip(measured, windows, strict=True):
      taken.append(_serve(cell, prompts, turn * responses, responses, meter))
      note(f"round {turn + 1} of {settings.rounds}: {_in_words(cell)}, {taken[-1][0].seconds:.1f} s")
  idle.append(_at_rest(meter))
  peaks.append(_peak(model.config.model.dtype))
  watts = [energy.total / energy.seconds for _, energy in idle if energy.total is not None]
  found = {
    "model": model.words,
    "prompt_tokens": prompts.tokens.shape[1],
    "response_tokens": NEW,
    "prompt_losses": prompts.losses,
    "settings": dataclasses.asdict(settings),
    "energy": {
      "counters": [counter.name for counter in meter.counters],
      "left_out": meter.left_out,
      "reason": meter.reason,
      "idle_watts": statistics.mean(watts) if watts else None,
    },
    "busy_at_rest": [busy for busy, _ in idle],
    "dense_matmul_gflops": max(peaks) / 1e9,
  }
  return found | {
    "cells": [_figures(c, w, model, prompts, settings, found) for c, w in zip(measured, windows, strict=True)]
  }


def _serve(cell: Cell, prompts: Prompts, first: int, responses: int, meter: EnergyMeter) -> tuple[Window, Energy]:
  """One turn. All contenders get the same prompts with the same seeds."""
  budget = None if cell.who == "fixed" else cell.budget
  loop = ClosedLoop(cell.engine, prompts.requests(first, budget=budget, **SAMPLING), cell.clients)
  loop.warm_up()
  with meter.measure() as energy:
    window = loop.measure(responses)
  loop.end()
  return window, energy


def _at_rest(meter: EnergyMeter) -> tuple[float | None, Energy]:
  with meter.measure() as energy:
    busy = machine.busy_share(AT_REST)
  return busy, energy


def _peak(dtype: str) -> float:
  sizes = PEAK_SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
  products = [ours.matmul(size, dtype) for size in sizes]
  return max(product.report()["flops"] / min(timed(product, 8)[1:]) for product in products)  # the first compiles


def _in_words(cell: Cell) -> str:
  return f"{cell.who}, {cell.budget:g} experts, {cell.clients} at a time"


def _percentiles(seconds: list[float]) -> dict[str, float]:
  return {f"p{p}": 1e3 * float(np.percentile(seconds, p)) for p in PERCENTILES}


def _figures(cell: Cell, taken: list, model: Served, prompts: Prompts, settings: Settings, found: dict) -> dict:
  """Sums up a cell: latencies of all rounds' responses together, the median round's rate, the energy of all."""
  windows, energies = zip(*taken, strict=True)
  answered = [answer for window in windows for answer in window.answered]
  experts = sum(a.experts for a in answered) / sum(a.tokens for a in answered)
  rate = statistics.median(window.tokens / window.seconds for window in windows)
  length = prompts.tokens.shape[1]
  prompt_experts = cell.budget if cell.who == "fixed" else prompts.experts[cell.budget]
  flops = cost.response_flops(model.config, length, NEW, prompt_experts, experts)
  figures = {
    "who": cell.who,
    "budget": cell.budget,
    "clients": cell.clients,
    "responses": len(answered),
    "latency_ms": _percentiles([a.latency_s for a in answered]),
    "first_token_ms": _percentiles([a.first_token_s for a in answered]),
    "experts": experts,
    "by_kind": {kind: _of_kind([a for a in answered if a.kind == kind]) for kind in ("easy", "hard")},
    "tokens_per_second": rate,
    "tokens_per_second_by_round": [window.tokens / window.seconds for window in windows],
    "flops_per_token": cost.generated_token_flops(model.config, length, NEW, experts),
    "flops_per_response": flops,
    "flops_per_second": flops * rate / NEW,
    "of_peak": flops * rate / NEW / (found["dense_matmul_gflops"] * 1e9),
    "device_hours_per_million_tokens": cost.device_hours_per_million_tokens(rate),
  }
  if settings.price_per_hour is not None:
    figures["price_per_million_tokens"] = cost.price_per_million_tokens(settings.price_per_hour, rate)
  return figures | _energy(windows, energies, found["energy"]["idle_watts"], settings.grid_g_per_kwh)


def _of_kind(answered: list) -> dict | None:
  if not answered:
    return None
  experts = [a.experts / a.tokens for a in answered]
  latency = _percentiles([a.latency_s for a in answered])
  return {"responses": len(answered), "experts": statistics.mean(experts), "latency_ms": latency}


def _energy(windows, energies, idle_watts: float | None, grid_g_per_kwh: float | None) -> dict:
  """Returns joules and grams of a response, the machine's rest included and apart; None where nothing can be read."""
  if idle_watts is None or any(energy.total is None for energy in energies):
    return {"joules_per_response": None, "joules_above_idle_per_response": None, "grams_co2_per_response": None}
  joules, seconds = sum(e.total for e in energies), sum(e.seconds for e in energies)
  responses = sum(window.tokens for window in windows) / NEW
  per_response = joules / responses
  return {
    "joules_per_response": per_response,
    "joules_above_idle_per_response": cost.joules_above_idle(joules, seconds, idle_watts) / responses,
    "grams_co2_per_response": None if grid_g_per_kwh is None else cost.grams_of_co2(per_response, grid_g_per_kwh),
  }
