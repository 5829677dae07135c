"""The endless stream of training batches, and its position."""

from typing import Any

import grain

from moe_lab.errors import UserError
from moe_lab.types import Batch


class Loader:
  """Iterates over training batches without end; can be stopped and taken up again at the same batch.

  Nothing is fetched ahead: `get_state` is the position right after the last batch handed out. The stream is a function
  of the data, the seed and the row length alone, so resuming does not depend on devices or processes.

  On several hosts each process reads the whole stream, and only its own devices' rows go further
  (`sharding.rules.on_devices`). Where a row begins depends on the lengths, in tokens, of all documents before it, so a
  host cannot leave out what it does not feed. It costs each the tokenizer's work for all; documents that fit
  `text.CACHED_TOKENS` are tokenised once.
  """

  def __init__(self, rows: grain.IterDataset, batch_size: int, identity: str):
    """Args: rows: yields {"tokens", "segments", "classes"}, int32 [L + 1] each; identity: names the stream."""
    self._batches = iter(rows.batch(batch_size, drop_remainder=True))
    self._identity = identity

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> Batch:
    return Batch(**next(self._batches))

  def get_state(self) -> dict[str, Any]:
    """Returns the position, as values that come back from JSON as they were."""
    return {"identity": self._identity, "position": _with(list, self._batches.get_state())}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position, also one that went through JSON.

    Raises:
      UserError: the position is one in other data, where it would mean something else.
    """
    if state["identity"] != self._identity:
      raise UserError(
        "config.data: wanted the documents, seed, seq_len, weights and tokenizer that the saved position"
        f" belongs to (data {state['identity']}), got others (data {self._identity})"
      )
    self._batches.set_state(_with(tuple, state["position"]))


def _with(sequence: type, value: Any) -> Any:
  # JSON has lists only, but grain's packing takes the list [-1, -1] for the slice of a document that is there.
  if isinstance(value, dict):
    return {key: _with(sequence, item) for key, item in value.items()}
  return sequence(_with(sequence, item) for item in value) if isinstance(value, list | tuple) else value
