"""Which experts lie in the accelerator's memory, and where: the books of a cache of the least recently used."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np


def in_order_of_use(expert_TK: np.ndarray, valid_TK: np.ndarray) -> list[int]:
  """Returns the distinct experts that tokens take, the last used last: token by token, a token's best expert last."""
  used = expert_TK[:, ::-1][valid_TK[:, ::-1]][::-1]  # the latest first
  experts, latest = np.unique(used, return_index=True)
  return experts[np.argsort(-latest)].tolist()


class Residents:
  """Slots of a pool that all layers share.

  Attributes:
    fetched_Z: int64, experts of each layer that were put into the pool so far.
  """

  def __init__(self, capacity_Z: Sequence[int], staging: int):
    """Begins without any.

    Args:
      capacity_Z: experts of each layer that stay from step to step.
      staging: further slots, at least one, for those of a step that do not stay.
    """
    assert staging > 0
    self.num_slots = sum(capacity_Z) + staging
    self.fetched_Z = np.zeros(len(capacity_Z), np.int64)
    self._capacity_Z = list(capacity_Z)
    self._slot_of: list[dict[int, int]] = [{} for _ in capacity_Z]  # the least recently used first
    self._free = deque(range(self.num_slots))

  def passes(self, layer: int, taken: Sequence[int]) -> Iterator[tuple[list[tuple[int, int]], dict[int, int]]]:
    """Has the experts of a step in the pool, in as many passes as it takes; go through all of them.

    Each missing expert is fetched once. What the step finds when it comes is not missing, and afterwards the last used
    stay, as `preflight.residency.lru_misses` counts.

    Args:
      layer: number of the mixture-of-experts layer.
      taken: its distinct experts, the last used last.

    Yields:
      experts to put into slots now, and the slot of each expert to compute then.
    """
    slot_of, capacity = self._slot_of[layer], self._capacity_Z[layer]
    order = [expert for expert in slot_of if expert not in taken] + list(taken)
    stays = set(order[max(len(order) - capacity, 0) :])
    # Those that do not stay first: their slots serve the next ones.
    missing = deque(sorted((e for e in taken if e not in slot_of), key=stays.__contains__))
    self.fetched_Z[layer] += len(missing)
    self._release(slot_of, [e for e in slot_of if e not in stays and e not in taken])
    computed = {e: slot_of[e] for e in taken if e in slot_of}
    while computed or missing:
      fetched = []
      while missing and self._free:
        expert = missing.popleft()
        slot_of[expert] = computed[expert] = self._free.popleft()
        fetched.append((expert, slot_of[expert]))
      yield fetched, computed
      self._release(slot_of, [e for e in computed if e not in stays])
      computed = {}
    self._slot_of[layer] = {expert: slot_of[expert] for expert in order if expert in stays}

  def _release(self, slot_of: dict[int, int], experts: list[int]) -> None:
    self._free.extend(slot_of.pop(expert) for expert in experts)
