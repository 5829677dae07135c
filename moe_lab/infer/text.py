"""Text from tokens as they come: whole characters only, and never the beginning of a stop string."""

from collections.abc import Callable, Sequence

CONTEXT = 4  # tokens of the prompt that the first new ones are decoded with


class TextStream:
  """Decodes one response.

  Attributes:
    text: all of it so far, without what is held back.
    stopped: whether a stop string has come; nothing is added after that.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), prompt: Sequence[int] = ()):
    """Args: decode: tokens to text; stop: strings that end it; prompt: the tokens that came before."""
    self.text, self.stopped = "", False
    self._decode, self._stop = decode, tuple(stop)
    # What a token reads as depends on its neighbours, so new tokens are decoded behind some old ones, which are then
    # cut off. `_tokens` are the old and the new; the first `_done` are in `_held` or `text` already.
    self._tokens = list(map(int, prompt[-CONTEXT:]))
    self._done, self._held = len(self._tokens), ""

  def push(self, token: int) -> str:
    """Takes one token; returns the text that is certain now, which may be empty."""
    self._tokens.append(int(token))
    old, new = self._decode(self._tokens[: self._done]), self._decode(self._tokens)
    if new.endswith("\ufffd") or len(new) < len(old):
      return ""  # the rest of the character is still to come
    self._held += new[len(old) :]
    self._tokens = self._tokens[-CONTEXT:]
    self._done = len(self._tokens)
    found = [at for at in map(self._held.find, self._stop) if at >= 0]
    if found:
      self.stopped = True
      return self._give(min(found), rest="")
    return self._give(len(self._held) - self._beginning_of_a_stop())

  def finish(self) -> str:
    """Returns what was held back, when no more tokens come."""
    return "" if self.stopped else self._give(len(self._held))

  def _give(self, length: int, rest: str | None = None) -> str:
    given, self._held = self._held[:length], self._held[length:] if rest is None else rest
    self.text += given
    return given

  def _beginning_of_a_stop(self) -> int:
    """Returns how many characters at the end might begin a stop string."""
    most = max(map(len, self._stop), default=1) - 1
    return next(
      (n for n in range(min(most, len(self._held)), 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0
    )
