"""A headless Chromium, driven over its DevTools protocol through a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE = 60.0  # seconds for anything that a test waits for


class Browser:
  """One page.

  Attributes:
    console: what the page logged, errors of its policy included.
  """

  def __init__(self, to, back):
    """Args: to, back: ends of the pipes."""
    self._to, self._back, self._pending, self._number, self._session = to, back, b"", 0, None
    self.console: list[str] = []
    target = self.send("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
      self.send(f"{domain}.enable")

  def send(self, method: str, **params) -> dict:
    """Returns what a command of the protocol gives."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    self._to.write(json.dumps(message).encode() + b"\0")
    self._to.flush()
    while True:
      answer = self._read()
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]
      if answer["method"] == "Log.entryAdded":
        self.console.append(answer["params"]["entry"]["text"])
      elif answer["method"] == "Runtime.exceptionThrown":
        self.console.append(json.dumps(answer["params"]["exceptionDetails"]))

  def _read(self) -> dict:
    while b"\0" not in self._pending:
      part = os.read(self._back.fileno(), 1 << 20)
      assert part, "the browser has ended"
      self._pending += part
    message, _, self._pending = self._pending.partition(b"\0")
    return json.loads(message)

  def value(self, expression: str):
    """Returns what an expression of JavaScript gives."""
    result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")

  def wait(self, expression: str):
    """Returns an expression's value once it is true."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
      if value := self.value(expression):
        return value
      time.sleep(0.05)
    raise AssertionError(f"never true: {expression}")

  def open(self, url: str, width=1100, height=900, dark=False) -> None:
    """Opens an address in a window of some size."""
    self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.send("Emulation.setEmulatedMedia", features=[scheme])
    self.send("Page.navigate", url=url)
    self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

  def type(self, text: str) -> None:
    """Types into what has the focus."""
    self.send("Input.insertText", text=text)

  def press(self, key: str, code: int, modifiers=0) -> None:
    """Presses a key by its name and number; modifiers: 2 is Ctrl, 8 is Shift."""
    for kind in ("rawKeyDown", "keyUp"):
      self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)

  def screenshot(self, path: Path) -> None:
    data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    path.write_bytes(base64.b64decode(data))


def _above(descriptor: int) -> int:
  """Returns another number for a descriptor, out of the way of 3 and 4."""
  other = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
  os.close(descriptor)
  return other


@contextlib.contextmanager
def browser():
  """Yields a fresh browser."""
  (theirs_in, to), (back, theirs_out) = (map(_above, os.pipe()) for _ in range(2))
  with tempfile.TemporaryDirectory() as profile:
    # The protocol's pipe has the descriptors 3 and 4.
    script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-'
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-dev-shm-usage",
                 "--disable-background-networking", f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(
      ["bash", "-c", script, CHROMIUM, *arguments], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
    )
    os.close(theirs_in), os.close(theirs_out)
    try:
      with os.fdopen(to, "wb") as to, os.fdopen(back, "rb") as back:
        yield Browser(to, back)
    finally:
      process.terminate()
      process.wait(20)
