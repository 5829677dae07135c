"""The load on the server: its arithmetic, and a short run of all of it."""

import dataclasses
import random

import pytest

from benchmarks import load_clients, serve
from benchmarks.machine import describe


def test_memory_is_flat_by_its_slope_once_settled():
  # Grows for a fifth of the time, by 10 MiB a sample, and then by one MiB in 60 s.
  samples = [(0.0, 100.0), (60.0, 110.0), (120.0, 120.0), (180.0, 121.0), (240.0, 122.0), (600.0, 128.0)]
  found = serve._flatness(samples)
  assert found == {
    "first_mib": 100.0,
    "settled_mib": 120.0,
    "last_mib": 128.0,
    "slope_mib_per_minute": pytest.approx(1),
  }


def test_quantiles():
  assert serve._quantiles([float(n) for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
  assert serve._quantiles([1.0]) == {}


def test_requests_fit_the_context_and_are_of_many_kinds():
  rng = random.Random(0)
  bodies = [load_clients.body(rng, kind) for kind in load_clients.KINDS for _ in range(200)]
  prompts = [body["prompt"] for body in bodies if "prompt" in body]
  assert 0 < sum("messages" in body for body in bodies) < len(bodies) / 2
  most = load_clients.PROMPT[1] + load_clients.NEW[1]
  assert max(map(len, prompts)) > 10 * min(map(len, prompts)) and most < serve.CONTEXT
  assert {body["stream"] for body in bodies} == {True, False}
  assert all(max(prompt) < serve.config().data.vocab_size for prompt in prompts)


@pytest.mark.slow
def test_a_short_run_fails_nobody(monkeypatch, tmp_path):
  pytest.importorskip("fastapi")
  whole = serve.config()
  small = dataclasses.replace(
    whole.model, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, expert_dim=16
  )
  monkeypatch.setattr(serve, "config", lambda: dataclasses.replace(whole, model=small))
  plan = serve.Plan(seconds=8.0, clients=24, requests=8, rounds=1)
  found = serve.report(lambda words: None, plan)
  load, totals = found["load"], found["totals"]
  assert load["failed"] == [] and load["requests"] == sum(load["by_kind"].values()) > plan.clients
  assert totals["unfinished"] == 0 and totals["requests"].keys() == {"200"} and totals["tokens"] >= load["tokens"] > 0
  assert found["turns"][0].keys() == set(serve.WAYS) and load["first_mib"] > 100
  path = serve.save(tmp_path, found, describe(), "the command")
  assert "failed requests" in path.read_text() and path.with_suffix(".html").stat().st_size > 1000
