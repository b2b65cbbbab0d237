"""A headless browser, driven over the DevTools protocol through a pipe: no port, no package.

Source: https://chromedevtools.github.io/devtools-protocol; messages are JSON that ends with NUL,
read from descriptor 3 and written to descriptor 4 with ``--remote-debugging-pipe``.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0  # for one answer; a busy machine starts a browser in ten


def find_browser() -> str | None:
    """The installed browser, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser did not do what it was told."""


class Browser:
    """A browser process.

    Args:
        profile: An empty folder for what it writes.
    """

    def __init__(self, profile: Path) -> None:
        command = find_browser()
        assert command is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = (
            "--headless=new",
            "--no-sandbox",  # there is none for root, as whom CI runs
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        )
        # The shell puts the pipes where the browser looks for them.
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, command, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        self.targets: list[str] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise BrowserError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, method: str, session: str) -> None:
        """Wait for an event that was not asked for before."""
        place = 0
        while True:
            for event in self.events[place:]:
                if event.get("method") == method and event.get("sessionId") == session:
                    return
            place = len(self.events)
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise BrowserError(f"no answer (exit status {self._process.poll()})")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value

    def close_tabs(self) -> None:
        """Close what ``Tab.open`` opened: each is a process of its own."""
        while self.targets:
            self.call("Target.closeTarget", targetId=self.targets.pop())

    def close(self) -> None:
        """End the browser."""
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)


@dataclass
class Tab:
    """A page as one reader sees it.

    Attributes:
        browser: The browser.
        session: The protocol's name of this tab.
        width: Of the window, in CSS pixels.
        height: Of the window.
    """

    browser: Browser
    session: str
    width: int
    height: int

    @classmethod
    def open(
        cls, browser: Browser, file: Path, *, width: int, height: int = 900, dark: bool = False
    ) -> Tab:
        """Open a file as a window of this width shows it; 480 pixels and less are a phone's."""
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.targets.append(target)
        session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = cls(browser, session, width, height)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width <= 480,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        browser.events.clear()
        tab.call("Page.navigate", url=file.resolve().as_uri())
        browser.wait_for("Page.loadEventFired", session)
        tab.evaluate("document.fonts.ready.then(() => 1)")
        return tab

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this tab."""
        return self.browser.call(method, self.session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise BrowserError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def named(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of a kind so far."""
        return [
            event["params"]
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]

    def complaints(self) -> list[str]:
        """What the browser says on its console, and exceptions."""
        said = [entry["entry"]["text"] for entry in self.named("Log.entryAdded")]
        said += [str(entry["args"]) for entry in self.named("Runtime.consoleAPICalled")]
        return said + [str(entry) for entry in self.named("Runtime.exceptionThrown")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        return [entry["request"]["url"] for entry in self.named("Network.requestWillBeSent")]

    def screenshot(self, file: Path, *, most: int = 16_000) -> bytes:
        """A picture of the whole page, ``most`` pixels high at most."""
        height = min(most, int(self.evaluate("document.documentElement.scrollHeight")))
        clip = {"x": 0, "y": 0, "width": self.width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        data = base64.b64decode(shot["data"])
        file.write_bytes(data)
        return data

    def print_pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])
