"""Training from start to result: evaluate, save, read, step, log."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lab.config.hosts import Hosts
from moe_lab.config.resolve import to_json
from moe_lab.config.schema import Config
from moe_lab.data.loader import Data, open_data
from moe_lab.errors import PREEMPTED, ConfigError, RunError
from moe_lab.evaluate.bigram import bigram_report
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.evaluate.held_out import held_out_report
from moe_lab.evaluate.perplexity import evaluate, make_eval_step
from moe_lab.io import hosts
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.files import dump_json, write_text
from moe_lab.io.progress import Progress
from moe_lab.io.run import Run, open_run
from moe_lab.io.writers import MetricsWriter, NoWriter, read_metrics
from moe_lab.nn.transformer import Transformer
from moe_lab.ops import native
from moe_lab.routing import budget_table
from moe_lab.sharding.mesh import mesh_or_none
from moe_lab.sharding.rules import on_devices, params_shardings, state_shardings
from moe_lab.train.losses import num_twins
from moe_lab.train.metrics import Metrics, merge, summarise
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.signals import AnyPreempted, Preemption
from moe_lab.train.skipped import SkippedBatches
from moe_lab.train.state import TrainState, abstract_state, initial_state
from moe_lab.train.step import make_train_step
from moe_lab.train.watchdog import Watchdog


class Ledger:
  """What a run has spent so far: tokens, FLOPs, and experts since the policy learns. Travels in the checkpoint."""

  def __init__(self, config: Config, saved: dict | None):
    self._config = config
    self.spent = saved or {"tokens": 0.0, "flops": 0.0, "policy_tokens": 0.0, "policy_experts": 0.0}

  def add(self, record: dict, metrics: Metrics, first_step: int) -> None:
    """Takes in the summed metrics of some steps; `record` is their summary."""
    executed = float(metrics.token_count)  # second rollouts are compute too, but not data
    forward = forward_flops_per_token(self._config, record["mean_experts"], self._config.data.seq_len / 2)["total"]
    self.spent["tokens"] += self.tokens_per_step * float(metrics.steps)
    self.spent["flops"] += 3 * forward * executed
    if first_step >= self._config.routing.warmup_steps:
      self.spent["policy_tokens"] += executed
      self.spent["policy_experts"] += executed * record["mean_experts"]

  @property
  def tokens_per_step(self) -> int:
    return self._config.train.batch_size * self._config.data.seq_len

  @property
  def mean_experts(self) -> float | None:
    """Realised in training since the random warm-up; None before its end."""
    return self.spent["policy_experts"] / self.spent["policy_tokens"] if self.spent["policy_tokens"] else None


class Start(NamedTuple):
  """What a run begins from that does not begin with random weights.

  Attributes:
    state: makes the one before the first step, in the form of the configuration; arrays of numpy. Not called where
      a run goes on.
    reference: see `step.make_train_step`; None: the router is not held.
    fingerprint: of the tokenizer that the weights were trained with.
    notes: for run.json: where it comes from.
  """

  state: Callable[[], TrainState]
  reference: Any
  fingerprint: str
  notes: dict


def train(
  config: Config,
  workdir: Path,
  cache_dir: Path,
  argv: list[str],
  stop_at: int | None = None,
  start: Start | None = None,
  step_timeout: float = Hosts.step_timeout,
) -> dict:
  """Trains until `config.train.steps`, or continues the run in `workdir`.

  On several hosts, each calls it with the same arguments; the first writes.

  Args:
    config: of the run.
    workdir: its directory.
    cache_dir: for tokenizers.
    argv: the command, for the record.
    stop_at: leave as if preempted after this many steps; for tests of resuming.
    start: what to begin from, the same at every launch; None: random weights.
    step_timeout: seconds that a step may take with what follows it; a process that hangs for longer ends.

  Returns:
    The result: what the program prints as its last line.

  Raises:
    UserError: bad data, another run in `workdir`, hosts that have not the same.
    RunError: the run failed (not finite, disk full).
    SystemExit: 75 after SIGTERM to any process, with everything saved.
  """
  with Preemption() as preemption:  # first, for once hosts have met jax takes SIGTERM and keeps it to itself
    return _train(config, workdir, cache_dir, argv, stop_at, start, step_timeout, preemption)


def _train(
  config: Config, workdir: Path, cache_dir: Path, argv: list[str], stop_at, start, step_timeout, preemption
) -> dict:
  hosts.check_same("the configuration", to_json(config))
  mesh = mesh_or_none(config.mesh)  # first, for it says what does not fit
  data = open_data(config.data, cache_dir)
  hosts.check_same("config.data", [data.fingerprint, data.manifest])
  if start is not None and start.fingerprint != data.fingerprint:
    raise ConfigError(
      "data.tokenizer", config.data.tokenizer, f"the tokenizer of the trained model ({start.fingerprint[:12]})"
    )
  first = hosts.is_first()
  with open_run(workdir, config, fingerprint=data.fingerprint, manifest=data.manifest, argv=argv) as run:
    if start is not None:
      run.note(**start.notes)
    if first and data.tokenizer is not None:
      # So that the run can be used without its data.
      (workdir / data.tokenizer.file_name).write_bytes(data.tokenizer.model)
    with (
      Checkpointer(workdir, config.train.keep_checkpoints) as checkpointer,
      MetricsWriter(workdir) if first else NoWriter() as writer,
      Watchdog(step_timeout, workdir, jax.process_index()) as watchdog,
      Progress(config.train.steps, shown=first) as progress,
    ):
      if config.routing.learns_counts and config.train.steps <= config.routing.warmup_steps:
        progress.note(
          f"all of train.steps = {config.train.steps} lie within routing.warmup_steps = {config.routing.warmup_steps}, "
          "whose counts are drawn at random: no policy is learned"
        )
      if jax.default_backend() == "cpu":
        run.note(cpu_kernels="native" if native.available() else "XLA")
      parts = (config, mesh, run, data, checkpointer, writer, watchdog, progress, preemption, stop_at, start)
      return _Training(*parts).run()


class _Training:
  """The parts of one launch, so that the loop below reads top to bottom."""

  def __init__(
    self,
    config: Config,
    mesh,
    run: Run,
    data: Data,
    checkpointer,
    writer,
    watchdog,
    progress,
    preemption,
    stop_at,
    start,
  ):
    self.config, self.run_record, self.data = config, run, data
    self.checkpointer, self.writer, self.progress = checkpointer, writer, progress
    self.mesh, self.watchdog, self.stop_at, self.start = mesh, watchdog, stop_at, start
    self.preempted = AnyPreempted(preemption, mesh)
    self.model, self.optimizer = Transformer(config, self.mesh), make_optimizer(config.train)
    self.eval_step = watchdog.watched("an evaluation", make_eval_step(config, self.model))
    self.loader = data.train_loader(config.train.batch_size)
    self.skipped = SkippedBatches(run.workdir, hosts.is_first())

  def run(self) -> dict:
    """Trains to the end; see `train`."""
    config = self.config.train
    state, step = self._start()
    train_step = make_train_step(self.config, self.model, self.optimizer)
    if self.start is not None and self.start.reference is not None:
      shardings = params_shardings(self.start.reference, self.mesh) if self.mesh else None
      train_step = functools.partial(train_step, reference=_placed(self.start.reference, shardings))
    train_step = self.watchdog.watched("a training step", self.preempted.along(train_step))
    if step < config.steps:
      self.progress.note("compiling the training step")
    since, first, started = None, step, time.monotonic()
    while step < config.steps:
      if self.preempted.requested() or step == self.stop_at:
        if since is not None:
          self._log(step, state, since, first, started)
        self._save(step, state)
        self.checkpointer.wait()
        self.progress.note(f"stopped at step {step} of {config.steps}; the same command goes on from here")
        raise SystemExit(PREEMPTED)
      batch = next(self.loader)
      state, metrics = train_step(state, on_devices(batch, self.mesh) if self.mesh else batch)
      since = metrics if since is None else merge(since, metrics)
      step += 1
      self.skipped.add(step, batch, metrics.skipped)
      log = step % config.log_every == 0 or step == self.config.routing.warmup_steps
      evaluating = step % config.eval_every == 0 or step == config.steps
      saving = step % config.checkpoint_every == 0 or step == config.steps
      if log or evaluating or saving:
        self._log(step, state, since, first, started)
        since = None
        if evaluating:
          self._evaluate(step, state)
        if saving:
          self._save(step, state)
        first, started = step, time.monotonic()
    self.checkpointer.wait()
    return self._finish(state)

  def _start(self) -> tuple[TrainState, int]:
    """Returns the state and the steps done: the newest checkpoint's, or the beginning."""
    abstract = abstract_state(self.config)
    # Without a mesh said as well, as it is of a restored state: else a run that goes on would compile its steps anew.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = state_shardings(abstract, self.mesh) if self.mesh else jax.tree.map(lambda _: here, abstract)
    if self.checkpointer.latest_step() is None:
      if self.start is None:
        state = jax.jit(lambda: initial_state(self.config, self.optimizer), out_shardings=shardings)()
      else:
        state = _placed(self.start.state(), shardings)
      step, meta = 0, {}
    else:
      abstract = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), abstract, shardings)
      state, meta, step = self.checkpointer.restore(abstract)
      self.loader.set_state(meta["loader"])
      self.progress.note(f"resuming after step {step}")
    self.writer.resume(step)
    self.ledger = Ledger(self.config, meta.get("spent"))
    return state, step

  def _save(self, step: int, state: TrainState) -> None:
    if self.checkpointer.latest_step() != step:
      meta = {"loader": self.loader.get_state(), "spent": self.ledger.spent, "fingerprint": self.data.fingerprint}
      self.checkpointer.save(step, state, meta)

  def _log(self, step: int, state: TrainState, metrics: Metrics, first: int, started: float) -> None:
    """Writes and shows the steps after `first`; stops the run when updates keep failing."""
    record = summarise(metrics)
    seconds = time.monotonic() - started
    self.ledger.add(record, metrics, first)
    routing = self.config.routing
    budget = None if routing.fixed else budget_table.mean_asked(np.asarray(metrics.asked), routing)
    speed = self.ledger.tokens_per_step * (step - first) / seconds
    record = self._position("train", step) | record | {"tokens_per_second": speed, "budget": budget}
    if not routing.learns_counts:
      record = {k: v for k, v in record.items() if k not in ("greedy_experts", "price", "policy_entropy", "advantage")}
    self.writer.write(record)
    self.progress.update(
      step, loss=record["loss"], mean_experts=record["mean_experts"], budget=budget, tokens_per_second=speed
    )
    for found in self.skipped.look(record["skipped"]):
      self.writer.write(self._position("skipped", found["step"]) | {"batch": found["batch"]})
      where = f"; its batch is in {found['batch']}" if found["batch"] else ""
      self.progress.note(f"step {found['step']}: update skipped, gradient not finite or a spike{where}")
    if int(state.skipped_in_a_row) >= self.config.train.max_skipped:
      raise RunError(
        f"{int(state.skipped_in_a_row)} updates in a row had a gradient that is not finite, or a spike, "
        f"up to step {step}; "
        f"the last good checkpoint is step {self.checkpointer.latest_step()}; "
        f"lower config.train.learning_rate = {self.config.train.learning_rate}"
      )

  def _position(self, kind: str, step: int) -> dict:
    """The fields that every record begins with."""
    spent = {"tokens": self.ledger.spent["tokens"], "flops": self.ledger.spent["flops"]}
    return {"kind": kind, "step": step, "time": time.time()} | spent

  def _evaluate(self, step: int, state: TrainState) -> None:
    routing = self.config.routing
    result = evaluate(
      self.eval_step,
      state.params,
      state.router_state,
      self.data.eval_batches("validation", self.config.train.batch_size, self.config.train.eval_batches),
      routing.mean_count,
      class_names=self.data.class_names,
      slots=routing.slots,
    )
    self.writer.write(
      self._position("eval", step) | {"val_loss": result["loss"], "mean_experts": result["mean_experts"]}
    )
    self.progress.note(
      f"step {step}: validation loss {result['loss']:.3f}, greedy experts {result['mean_experts']:.2f}"
    )

  def _finish(self, state: TrainState) -> dict:
    """Evaluates both held-out splits in full beside the bigram, writes evaluation.json, returns the result."""
    self.progress.note("evaluating on the held-out documents")
    report = held_out_report(
      self.config, self.data, self.eval_step, state.params, state.router_state, self.progress.note
    )
    report |= bigram_report(self.data)
    speeds = [r["tokens_per_second"] for r in read_metrics(self.run_record.workdir) if r.get("kind") == "train"]
    result = {
      "steps": int(state.step),
      "val_loss": report["val_loss"],
      "val_bits_per_byte": report["val_bits_per_byte"],
      "bigram_loss": report["bigram_loss"],
      "bigram_bits_per_byte": report["bigram_bits_per_byte"],
      "test_loss": report["test_loss"],
      "test_bits_per_byte": report["test_bits_per_byte"],
      "bigram_test_loss": report["bigram_test_loss"],
      "budget": report["budget"],
      "budget_mode": self.config.routing.budget_mode if self.config.routing.learns_counts else None,
      "mean_experts": self.ledger.mean_experts,
      "eval_mean_experts": report["val_mean_experts"],
      "tokens_per_second": float(np.median(speeds)) if speeds else None,
      "twins_per_batch": num_twins(self.config, self.config.train.batch_size),
      "workdir": self.run_record.workdir,
    }
    if hosts.is_first():
      write_text(self.run_record.workdir / "evaluation.json", dump_json(report | {"result": result}) + "\n")
    self.progress.note(_in_words(result))
    return result


def _placed(tree: Any, shardings: Any) -> Any:
  """Returns copies of arrays on the devices: a step takes its state's buffers for itself."""
  return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(tree)


def _in_words(result: dict) -> str:
  words = f"held-out loss {result['val_loss']:.3f} nats per token (bigram {result['bigram_loss']:.3f})"
  if result["val_bits_per_byte"]:
    words += f", {result['val_bits_per_byte']:.3f} bits per byte (bigram {result['bigram_bits_per_byte']:.3f})"
  if result["mean_experts"]:
    words += f"; experts {result['mean_experts']:.2f} in training"
  return words + f"; experts {result['eval_mean_experts']:.2f} in greedy evaluation"
