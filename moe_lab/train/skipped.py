"""The batches of updates that were skipped, kept so that one can look at what was in them."""

from pathlib import Path

import jax
import numpy as np

from moe_lab.types import Batch

FOLDER = "skipped"
MOST = 16  # files of a run; what goes wrong always is well known by then


class SkippedBatches:
  """Holds the batches since the last look, whose steps may not be done yet."""

  def __init__(self, workdir: Path, writes: bool):
    """Args: workdir: of the run; writes: whether this process is the one that does."""
    self._folder, self._writes = workdir / FOLDER, writes
    self._since: list[tuple[int, Batch, jax.Array]] = []

  def add(self, step: int, batch: Batch, skipped: jax.Array) -> None:
    """Takes in a step, its batch, and whether it was skipped, as the device will say."""
    self._since.append((step, batch, skipped))

  def look(self, number: int) -> list[dict]:
    """Returns {step, batch: file or None} for each that was skipped since the last look.

    A file is numpy's, without pickles: tokens, segments, as in `Batch`.

    Args:
      number: of them, which the summed metrics tell; the device is asked about each step only if there are any.
    """
    since, self._since = self._since, []
    if not number:
      return []
    return [{"step": step, "batch": self._kept(step, batch)} for step, batch, skipped in since if float(skipped) > 0]

  def _kept(self, step: int, batch: Batch) -> str | None:
    if not self._writes:
      return None
    self._folder.mkdir(exist_ok=True)
    if len(list(self._folder.iterdir())) >= MOST:
      return None
    name = f"{FOLDER}/{step}.npz"
    np.savez(self._folder.parent / name, tokens=batch.tokens, segments=batch.segments)
    return name
