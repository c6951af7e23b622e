"""A headless Chromium driven by its DevTools protocol over a pipe: what a reader of a page would do, see, and be told."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""Path of the browser, None where there is none."""

KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39}
"""Keys that tests press, with the number that the protocol wants."""


class Browser:
    """One browser with one tab, without any network.

    Attributes:
        problems: console errors, exceptions, refused resources, since the last :meth:`open`.
        requests: addresses asked for since then, other than the page itself.
    """

    def __init__(self, profile: Path, patience: float = 60) -> None:
        assert CHROMIUM
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._patience, self._number, self._rest = patience, 0, b""
        theirs, self._out = os.pipe()
        self._in, back = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
        ]
        flags += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # The protocol is spoken over the file descriptors 3 and 4.
        line = f'exec "$@" 3<&{theirs} 4>&{back}'
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", line, "bash", CHROMIUM, *flags], pass_fds=(theirs, back), **quiet)
        os.close(theirs)
        os.close(back)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End it."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(self._patience)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol; events that come before its answer are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + self._patience
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {self._patience:g} s")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise RuntimeError("the browser is gone")
            self._rest += part
        own, self._rest = self._rest.split(b"\0", 1)
        return json.loads(own)

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(str([own.get("value", own.get("description")) for own in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent" and told.get("type") != "Document":
            self.requests.append(told["request"]["url"])

    def open(self, path: Path, hash_: str = "", width: int = 1280, dark: bool = False) -> None:
        """Load a file anew, in a window of a width and with the colours that a reader's system prefers."""
        self.call("Page.navigate", url="about:blank")
        self.problems, self.requests = [], []
        # A window of this width, not a phone: a phone would zoom out of a page that is too wide.
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=path.resolve().as_uri() + (f"#{hash_}" if hash_ else ""))
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def js(self, expression: str) -> Any:
        """The value of an expression on the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + self._patience
        while not self.js(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {self._patience:g} s: {expression}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key, as a keyboard would."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key], **text)

    def screenshot(self, path: Path) -> None:
        """What is to be seen, as a PNG."""
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
