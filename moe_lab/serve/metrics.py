"""What Prometheus is told."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from moe_lab.infer.engine import Token
from moe_lab.serve.served import ServedModel
from moe_lab.serve.worker import Job, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
  """The server's figures, and the totals that it reports at its end."""

  def __init__(self, served: ServedModel):
    self._served = served
    self._registry = registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    self.requests = Counter("moe_lab_requests", "Answered requests.", ["endpoint", "status"], registry=registry)
    self.cancelled = Counter(
      "moe_lab_requests_cancelled", "Requests whose client left before the end.", registry=registry
    )
    self.prompt_tokens = Counter("moe_lab_prompt_tokens", "Tokens of prompts.", registry=registry)
    self.tokens = Counter("moe_lab_generated_tokens", "Tokens of responses.", registry=registry)
    self.flops = Counter("moe_lab_generation_flops", "FLOPs of the responses' tokens, reckoned.", registry=registry)
    self.first_seconds = Histogram(
      "moe_lab_time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=registry
    )
    self.token_seconds = Histogram(
      "moe_lab_time_per_token_seconds", "Of a response's tokens after the first.", buckets=_TOKEN_SECONDS,
      registry=registry,
    )  # fmt: skip
    least, most = served.card["compute"]["max_experts"]
    self.experts = Histogram(
      "moe_lab_experts_per_token", "Experts of a response's token, mean over layers.",
      buckets=[least + half / 2 for half in range(2 * (most - least) + 1)], registry=registry,
    )  # fmt: skip

  def watch(self, worker: Worker) -> None:
    """Adds what a worker is doing."""
    for name, words, value in (
      ("moe_lab_slots", "Sequences that can be decoded together.", lambda: worker.slots),
      ("moe_lab_slots_in_use", "Of which are taken.", lambda: worker.num_serving),
      ("moe_lab_queue_length", "Responses that wait for a slot.", lambda: worker.num_waiting),
      ("moe_lab_healthy", "Whether the engine works.", lambda: worker.trouble is None),
    ):
      Gauge(name, words, registry=self._registry).set_function(value)

  def count(self, endpoint: str, status: int) -> None:
    """Counts an answered request."""
    self.requests.labels(endpoint, str(status)).inc()

  def observe(self, job: Job, index: int, token: Token) -> None:
    """Takes in the next token of a job's response."""
    now, before = time.monotonic(), job.made[index]
    prompt = len(job.requests[index].prompt)
    if before == 0:
      job.first[index] = now
      self.first_seconds.observe(now - job.began)
      self.prompt_tokens.inc(prompt)
    job.made[index] += 1
    self.tokens.inc()
    self.experts.observe(token.experts)
    self.flops.inc(self._served.flops_per_token(token.experts, prompt + before))
    if token.finish is not None and before:
      self.token_seconds.observe((now - job.first[index]) / before)

  def text(self) -> bytes:
    """Returns all figures in Prometheus's format."""
    return generate_latest(self._registry)

  def totals(self) -> dict:
    """Returns what the program reports at its end."""
    value = self._registry.get_sample_value
    tokens = value("moe_lab_generated_tokens_total")
    by_status: dict[str, int] = {}
    for metric in self.requests.collect():
      for sample in metric.samples:
        if sample.name.endswith("_total"):
          status = sample.labels["status"]
          by_status[status] = by_status.get(status, 0) + int(sample.value)
    return {
      "requests": by_status,
      "cancelled": int(value("moe_lab_requests_cancelled_total")),
      "prompt_tokens": int(value("moe_lab_prompt_tokens_total")),
      "tokens": int(tokens),
      "mean_experts": value("moe_lab_experts_per_token_sum") / tokens if tokens else None,
      "flops": value("moe_lab_generation_flops_total"),
    }
