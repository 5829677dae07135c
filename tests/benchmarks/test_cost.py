"""The cost benchmark: what is measured, of whom, and what the reader is told."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import cost, cost_page, machine, served
from benchmarks.case import PRESETS, Case
from benchmarks.served import Served
from moe_lab.config.schema import METHODS, Config, DataConfig, ModelConfig, RoutingConfig
from moe_lab.errors import UserError
from moe_lab.infer.placement import served as as_served
from moe_lab.routing.registry import make_router
from moe_lab.types import Batch
from tests.infer.models import VOCAB, make

MACHINE = {
  "processor": "x", "cores": 2, "memory_gib": 1.0, "accelerator": None, "versions": {"python": "3", "torch": None}
}  # fmt: skip


class Rows:
  """Held-out rows; of some the first stretch is not one document."""

  def eval_batches(self, split, batch_size, max_batches):
    assert split == "validation"
    rng = np.random.default_rng(0)
    for number in range(max_batches):
      tokens = rng.integers(1, VOCAB, (batch_size, 25), np.int32)
      segments = np.ones_like(tokens)
      segments[0, 10:] += 1
      yield Batch(tokens + 0 * number, segments, np.zeros_like(tokens))


@pytest.fixture(scope="module")
def model():
  config, params, state = make("windowed")
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=16))
  return Served(config, as_served(params, config.model), state, Rows(), "a model of random weights")


def test_numbers_of_clients():
  assert [cost.levels(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


@pytest.mark.parametrize("method", METHODS)
def test_fixed_counts_have_the_same_weights(method):
  config = Config(ModelConfig(), RoutingConfig(method=method), DataConfig())
  fixed = served.with_fixed_count(config, 3)
  has, wanted = (make_router(c.routing).parameters(config.model) for c in (config, fixed))
  assert fixed.routing.mean_count == 3 and all(has[name] == value for name, value in wanted.items())


def test_prompts_are_the_easiest_and_the_hardest(model):
  found = served.prompts(model, (2.0, 1.0), candidates=24, kept=6)
  assert found.tokens.shape == (12, 16) and found.kinds == ["easy", "hard"] * 6
  assert found.losses["easy"] < found.losses["hard"] and set(found.experts) == {2.0, 1.0}
  kinds, asked = zip(*(next(found.requests(first, max_tokens=5)) for first in (0, 13)), strict=True)
  assert kinds == ("easy", "hard") and [r.seed for r in asked] == [0, 13]
  np.testing.assert_array_equal(asked[1].prompt, found.tokens[1])


def test_prompts_want_two_stretches(model):
  class Few(Rows):
    def eval_batches(self, split, batch_size, max_batches):
      yield Batch(*(np.ones((1, 25), np.int32) for _ in range(3)))

  with pytest.raises(UserError, match="two stretches of 16"):
    served.prompts(model._replace(data=Few()), (2.0,), candidates=6, kept=6)


def measured(model, monkeypatch) -> dict:
  """Returns a report of short responses."""
  monkeypatch.setattr(cost, "AT_REST", 0.05)
  monkeypatch.setattr(cost, "NEW", 10)
  monkeypatch.setitem(cost.SAMPLING, "max_tokens", 10)
  prompts = served.prompts(model, (2.0,), candidates=24, kept=6)
  settings = cost.Settings((2.0,), 2, responses=9, rounds=2, price_per_hour=3.6, grid_g_per_kwh=400.0)
  notes = []
  found = cost.report(model, prompts, settings, notes.append)
  assert any("round 2 of 2" in note for note in notes)
  return found


@pytest.mark.slow
def test_every_contender_at_every_number_of_clients(model, monkeypatch, tmp_path):
  found = measured(model, monkeypatch)
  cells = found["cells"]
  assert [(c["clients"], c["who"]) for c in cells] == [
    (n, who) for n in (1, 2) for who in ("dynamic", "dynamic, steady", "fixed")
  ]
  for cell in cells:
    assert cell["responses"] == 10 and cell["budget"] == 2.0  # nine, as many in each of two rounds
    latency, first = cell["latency_ms"], cell["first_token_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] and first["p50"] < latency["p50"]
    assert sum(kind["responses"] for kind in cell["by_kind"].values()) == 10
    rate = cell["tokens_per_second"]
    assert cell["price_per_million_tokens"] == pytest.approx(3.6 / 3600 * 1e6 / rate)
    assert cell["flops_per_second"] == pytest.approx(cell["flops_per_response"] / 10 * rate)
  assert all(cell["experts"] == 2.0 for cell in cells if cell["who"] == "fixed")
  assert found["settings"]["responses"] == 9 and found["dense_matmul_gflops"] > 1
  by_counter = bool(found["energy"]["counters"])
  assert all((cell["joules_per_response"] is not None) == by_counter for cell in cells)
  assert ("not measurable here" in " ".join(cost_page.words(found, MACHINE))) != by_counter
  path = cost_page.save(tmp_path, found, MACHINE, "the command")
  assert json.loads(path.with_suffix(".json").read_text())["cells"] == cells
  assert path.read_text().count("| dynamic, steady") == 2 + 2  # at both numbers of clients, and by kind of prompt


def test_energy_of_a_response_by_hand():
  # 3 rounds of 20 J in 0.5 s each, of 50 tokens: 120 J for a response of 100 tokens... of which rest takes 30 W.
  windows = [cost.Window(0.5, 50, [])] * 3
  energies = [cost.Energy(0.5, {"a": 12.0, "b": 8.0})] * 3
  per_response = cost._energy(windows, energies, 30.0, 360.0)
  assert per_response["joules_per_response"] == pytest.approx(60 / 150 * cost.NEW)
  assert per_response["joules_above_idle_per_response"] == pytest.approx((60 - 45) / 150 * cost.NEW)
  assert per_response["grams_co2_per_response"] == pytest.approx(60 / 150 * cost.NEW / 10_000)
  assert set(cost._energy(windows, [*energies[:2], cost.Energy()], 30.0, 360.0).values()) == {None}
  assert set(cost._energy(windows, energies, None, 360.0).values()) == {None}


def cell(who: str, clients: int, budget: float = 2.0, joules: float | None = None) -> dict:
  latency = {"p50": 100.0 * clients, "p95": 120.0 * clients, "p99": 130.0 * clients}
  kind = {"responses": 5, "experts": 1.5, "latency_ms": latency}
  return {
    "who": who, "budget": budget, "clients": clients, "responses": 10, "latency_ms": latency, "first_token_ms": latency,
    "experts": budget, "by_kind": {"easy": kind, "hard": kind}, "tokens_per_second": 1000.0, "flops_per_token": 2e6,
    "flops_per_response": 2e8, "flops_per_second": 2e9, "of_peak": 0.02, "device_hours_per_million_tokens": 0.278,
    "price_per_million_tokens": 1.25, "joules_per_response": joules, "joules_above_idle_per_response": joules,
    "grams_co2_per_response": joules,
  }  # fmt: skip


def by_hand(**changes) -> dict:
  """Returns a report with made-up figures."""
  return {
    "model": "a model of random weights",
    "prompt_tokens": 16,
    "prompt_losses": {"easy": 1.0, "hard": 3.0},
    "settings": dataclasses.asdict(cost.Settings((2.0, 1.0), 4, 10, 2, 4.5, 400.0)),
    "energy": {"counters": [], "left_out": "", "reason": "no RAPL package", "idle_watts": None},
    "busy_at_rest": [0.01, None],
    "dense_matmul_gflops": 100.0,
    "cells": [cell(who, n) for n in (1, 2, 4) for who in ("dynamic", "fixed")]
    + [cell(who, 4, 1.0) for who in ("dynamic", "fixed")],
  } | changes


def test_files(tmp_path):
  path = cost_page.save(tmp_path, by_hand(), MACHINE, "the command")
  text, drawn = path.read_text(), path.with_suffix(".html").read_text()
  assert "price/M tokens" in text and "Fewer than 100 responses" in text and "random weights" in text
  assert "not measurable here (no RAPL package)" in text and "Prices at 4.5 for an hour" in text
  # Three percentiles against clients, p99 and the price against experts; no energy.
  assert drawn.count('class="chart"') == 5 and "the command" in drawn and "Energy of a response" not in drawn
  assert "not measurable here" in drawn


def test_energy_is_drawn_where_it_is_measured(tmp_path):
  energy = {"counters": ["package-0"], "left_out": "", "reason": "", "idle_watts": 31.25}
  found = by_hand(energy=energy, cells=[cell("dynamic", n, joules=5.0) for n in (1, 2, 4)])
  told = " ".join(cost_page.words(found, MACHINE))
  assert "package-0" in told and "31.2 W" in told and "grid of 400 g" in told and "not measurable" not in told
  assert any("Energy of a response" in caption for _, caption in cost_page.charts(found))
  assert cost_page.rows(found)[0][-3:] == ("J/response", "of it above rest", "g CO2/response")
  assert cost_page.rows(by_hand())[0][-1] == "price/M tokens"


def test_the_reader_is_told_of_others_on_the_machine():
  assert "Other programs" not in " ".join(cost_page.words(by_hand(), MACHINE))
  assert "2% and 80%" in " ".join(cost_page.words(by_hand(busy_at_rest=[0.02, 0.8]), MACHINE))


def test_the_made_model_serves_the_budgets_that_are_asked_for():
  config = served.made_config(PRESETS["cpu"], (2.0, 1.0, 6.0))
  assert config.routing.budgets == (1.0, 6.0) and config.routing.budget == 2.0
  assert served.made_config(PRESETS["cpu"], (1.0,)).routing.budgets == (1.0, 2.0)


@pytest.mark.slow
def test_a_small_model_is_trained(monkeypatch, tmp_path):
  monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path))
  monkeypatch.setattr(served, "STEPS", 6)
  monkeypatch.setattr(served, "WARMUP_STEPS", 2)
  small = dict(dim=16, num_layers=1, num_heads=2, head_dim=8, num_experts=4, expert_dim=8, k_max=4, batch_size=2)
  model = served.made(Case(vocab_size=512, seq_len=32, **small), (2.0, 3.0))
  assert model.config.routing.budgets == (1.0, 3.0) and "trained for 6 steps" in model.words
  found = served.prompts(model, (2.0, 3.0), candidates=32, kept=8)
  assert found.tokens.shape == (16, 32) and found.losses["easy"] < found.losses["hard"]
  assert 1 <= found.experts[2.0] <= 4


def test_how_busy_a_machine_is():
  share = machine.busy_share(0.05)
  assert share is None or 0 <= share <= 1
