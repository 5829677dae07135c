"""Loss against compute and size: a power law by least squares with bootstrap intervals, and ratios at equal loss.

The law is L = exp(a) * F^-alpha * P^-beta with F the FLOPs per token and P the
total parameters, fitted to ln L. There is no irreducible loss in it: over the
factor of ten or so that a study spans, an offset and the exponents cannot be
told apart, so the exponents are local ones and are not to be extrapolated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_lab.evaluate.tradeoff import Point, compute_at

RESAMPLES = 2000
COVERED = 0.9  # of the bootstrap's distribution, between the bounds of an interval


class Interval(NamedTuple):
  """An estimate and the bounds of its 90% bootstrap interval."""

  value: float
  low: float
  high: float


class PowerLaw(NamedTuple):
  """ln L = a - alpha ln F - beta ln P.

  Attributes:
    a, alpha, beta: estimates; beta is None if the models do not tell size from compute.
    residual: root mean square of ln L over the fit: the relative error of a loss.
    models: how many it was fitted to.
  """

  a: Interval
  alpha: Interval
  beta: Interval | None
  residual: float
  models: int


def fit_power_law(models: Sequence[tuple[float, float, float]], seed: int = 0) -> PowerLaw | None:
  """Fits the law to models that were measured.

  Args:
    models: (FLOPs per token, total parameters, held-out loss in nats per token) of each.
    seed: of the bootstrap, which draws models with replacement.

  Returns:
    None with fewer than three different amounts of compute.
  """
  flops, parameters, loss = np.asarray(models, np.float64).reshape(-1, 3).T
  if len(set(flops)) < 3:
    return None
  # Centred, so that the condition of the matrix says whether the columns differ and not how large they are.
  columns = [np.ones_like(flops), -np.log(flops / flops[0])]
  both = np.stack([*columns, -np.log(parameters / parameters[0])], axis=1)
  design = both if np.linalg.cond(both) < 1e3 else both[:, :2]
  target = np.log(loss)

  # Back from the first model's units to 1 FLOP and 1 parameter.
  unit = np.array([np.log(flops[0]), np.log(parameters[0])])[: design.shape[1] - 1]

  def solve(rows: np.ndarray) -> np.ndarray | None:
    solution, _, rank, _ = np.linalg.lstsq(design[rows], target[rows], rcond=1e-8)
    return np.concatenate([solution[:1] + unit @ solution[1:], solution[1:]]) if rank == design.shape[1] else None

  fitted = solve(np.arange(len(target)))
  rng = np.random.default_rng(seed)
  drawn = (solve(rng.integers(0, len(target), len(target))) for _ in range(RESAMPLES))
  # A draw of too few different models has no answer of its own.
  bounds = np.quantile([s for s in drawn if s is not None], [(1 - COVERED) / 2, (1 + COVERED) / 2], axis=0)
  a, alpha, *beta = (Interval(float(v), float(low), float(high)) for v, low, high in zip(fitted, *bounds, strict=True))
  raw = np.stack([np.ones_like(flops), -np.log(flops), -np.log(parameters)], axis=1)[:, : len(fitted)]
  residual = float(np.sqrt(np.mean(np.square(raw @ fitted - target))))
  return PowerLaw(a, alpha, beta[0] if beta else None, residual, len(target))


def equal_loss_ratio(dense: Sequence[Point], compute: float, loss: float) -> float | None:
  """Returns how many times the compute of a model the dense curve needs for the model's loss.

  Args:
    dense: (compute, loss) of dense models of several sizes.
    compute, loss: of the model; compute in the curve's unit (FLOPs per token, training tokens, seconds).

  Returns:
    None if the loss lies outside what the dense models reach: nothing is extrapolated.
  """
  if not dense or loss > max(dense)[1] and loss > min(dense)[1]:
    return None
  needed = compute_at(dense, loss)
  return None if needed is None else needed / compute


def saved_to_loss(curve: Sequence[Point], compute: float, loss: float) -> float | None:
  """Returns `compute` over what a learning curve takes to the same loss: of tokens, FLOPs or seconds of training.

  Args:
    curve: (spent so far, held-out loss) of a run.
    compute, loss: what the other run has spent in all, and its loss on the same data.
  """
  needed = compute_at(curve, loss)
  return None if needed is None else compute / needed
