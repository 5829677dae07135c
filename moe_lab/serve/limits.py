"""What one client, and all together, may ask of the server; what an operator would set is a flag."""

import dataclasses

BODY_BYTES = 1 << 20
DISCARDED_BYTES = 8 * BODY_BYTES  # of a body that is too long, read so that the client sees the answer and no reset
HEADER_BYTES = 16 << 10
HEADER_SECONDS = 10.0  # for a request's head, from its first byte or the connection on
BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0  # that a client may leave what is ready for it unread
IDLE_SECONDS = 30.0  # between two requests of a connection

CHOICES = 16  # prompts times n of a request
N = 8
STOPS = 16
STOP_CHARACTERS = 200
COMPLETION_LOG_PROBS = 5
CHAT_LOG_PROBS = 20
ALTERNATIVES = 50_000  # of all tokens of a request: some MB in memory, and in the reply
MESSAGES = 1000
MESSAGE_PARTS = 100


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the operator sets.

  Attributes:
    queue: responses that may wait for a slot; one more is refused with 429.
    connections: that may be open at a time; one more is closed at once.
    seconds: that a request may take, waiting included.
  """

  queue: int = 64
  connections: int = 256
  seconds: float = 300.0
