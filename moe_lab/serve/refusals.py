"""What a client is told that can't have what it asks for, in OpenAI's form."""

import json

from starlette.responses import Response

STATUSES = {
  400: "A field, or the body, cannot be used as given.",
  401: "No key, or a wrong one.",
  403: "The Host header names another machine.",
  404: "No such model or place.",
  405: "Not a method of this place.",
  408: "The body did not come in time.",
  413: "The body is too long.",
  429: "All slots and the queue are taken.",
  500: "The engine failed.",
  503: "The server is about to end or has failed, or the request took too long.",
}
_AGAIN_SECONDS = 1  # what a client that finds the queue full, or the server leaving, is told to wait


class Refusal(Exception):
  """An answer that is an error.

  Attributes:
    status: of HTTP.
    message: a line that says what to change.
    param: the field it is about.
    code: for programs, such as "model_not_found".
    close: whether the connection ends with it.
  """

  def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, close=False):
    super().__init__(message)
    self.status, self.message, self.param, self.code, self.close = status, message, param, code, close

  @property
  def content(self) -> dict:
    """The body of the reply, and of the event that ends a stream."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

  def response(self) -> Response:
    """Returns it as a reply."""
    headers = {}
    if self.status == 401:
      headers["www-authenticate"] = "Bearer"
    if self.status in (429, 503):
      headers["retry-after"] = str(_AGAIN_SECONDS)
    if self.close:
      headers["connection"] = "close"
    return json_response(self.content, self.status, headers)


def json_response(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  """Returns a reply of JSON."""
  return Response(json_bytes(content), status, headers, media_type="application/json")


def json_bytes(content: dict) -> bytes:
  """Returns JSON; its values are plain, which `io.files.dump_json` would look into one by one."""
  return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def shown(value: object, most: int = 60) -> str:
  """Returns a client's value as a message quotes it: one short line that every encoding can spell."""
  text = value if isinstance(value, str) else repr(value)
  cut = text if len(text) <= most else text[:most] + "..."
  return ascii(cut) if isinstance(value, str) else cut.encode("ascii", "backslashreplace").decode()
