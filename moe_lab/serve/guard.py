"""What a request passes before a handler sees it: host, key, its body's length, and whether the server is ending."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable

from moe_lab.serve import limits
from moe_lab.serve.refusals import Refusal

LOOPBACK_NAMES = frozenset(("localhost", "127.0.0.1", "[::1]"))
OPEN = frozenset(("/", "/healthz", "/openapi.json"))  # without a key
GENERATING = frozenset(("/v1/completions", "/v1/chat/completions"))
_HEADERS = (
  (b"x-content-type-options", b"nosniff"),
  (b"referrer-policy", b"no-referrer"),
  (b"cache-control", b"no-store"),
)


class Guard:
  """ASGI middleware.

  Attributes:
    active: requests for generation that are being answered.
    ending: whether new ones are refused.
  """

  def __init__(self, app, *, key: str | None, loopback: bool, count: Callable[[str, int], None]):
    """Wraps an application.

    Args:
      app: what is behind it.
      key: that clients must have; None: none.
      loopback: whether the server is for this machine only: then a page of another site, whose name was made to point
        here (DNS rebinding), must not reach it.
      count: hears of each answered request: the place, or "other", and the status.
    """
    self._app, self._digest, self._loopback, self._count = app, key and _digest(key.encode()), loopback, count
    self._places = OPEN | GENERATING | {"/metrics", "/v1/models"}
    self.active, self.ending = 0, False

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    path = scope["path"]
    place = path if path in self._places else "other"

    async def noted(message):
      if message["type"] == "http.response.start":
        self._count(place, message["status"])
        message = message | {"headers": [*message.get("headers", ()), *_HEADERS]}
      await send(message)

    generating = path in GENERATING and scope["method"] == "POST"
    self.active += generating
    try:
      refusal = self._refusal(scope, generating)
      if scope["method"] == "POST":
        # Also of what is refused: closed on a body that still comes, the connection would be reset before the answer.
        receive = await _whole_body(scope, receive, most=0 if refusal else limits.BODY_BYTES)
      await (refusal.response() if refusal else self._app)(scope, receive, noted)
    except Refusal as of_body:
      await (refusal or of_body).response()(scope, receive, noted)
    except _Gone:
      pass
    finally:
      self.active -= generating

  def _refusal(self, scope, generating: bool) -> Refusal | None:
    headers = dict(scope["headers"])
    if self._loopback and _host_name(headers.get(b"host", b"")) not in LOOPBACK_NAMES:
      return Refusal(403, "Host: wanted localhost or 127.0.0.1, since the server is for this machine only", close=True)
    if self._digest and scope["path"] not in OPEN:
      scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
      # Of digests, so that neither time nor length tells anything.
      right = hmac.compare_digest(_digest(key.strip()), self._digest)
      if scheme.lower() != b"bearer" or not right:
        wanted = "wanted the right key in the header Authorization: Bearer KEY"
        return Refusal(401, wanted, code="invalid_api_key", close=True)
    if generating and self.ending:
      return Refusal(503, "the server is ending", code="ending", close=True)
    return None


def _digest(key: bytes) -> bytes:
  return hashlib.sha256(key).digest()


def _host_name(host: bytes) -> str:
  """Returns a Host header without its port."""
  name, colon, port = host.decode("latin-1").lower().rpartition(":")
  return name if colon and port.isdecimal() else host.decode("latin-1").lower()


class _Gone(Exception):
  """The client left before its body had come."""


async def _whole_body(scope, receive, most: int):
  """Reads a body and returns a `receive` that has it; of one with more than `most` bytes nothing is kept.

  Raises:
    Refusal: it is too long, or too slow.
  """
  body, size = bytearray(), 0
  too_long = Refusal(413, f"the body: wanted at most {most:,} bytes", code="body_too_long", close=True)
  if int(dict(scope["headers"]).get(b"content-length", b"0")) > limits.DISCARDED_BYTES:
    raise too_long
  try:
    async with asyncio.timeout(limits.BODY_SECONDS):
      more = True
      while more and size <= limits.DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
          raise _Gone
        size, more = size + len(message["body"]), message["more_body"]
        if size <= most:
          body += message["body"]
        else:
          body.clear()
  except TimeoutError:
    raise Refusal(408, f"the body took more than {limits.BODY_SECONDS:g} s", close=True) from None
  if size > most:
    raise too_long
  whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

  async def replay():
    return whole.pop() if whole else await receive()

  return replay
