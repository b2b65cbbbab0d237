"""A visitor of the chat page: looks, types, clicks, shows pictures."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devtools import Browser, BrowserError, Tab

SECONDS = 30.0
BOX = "#question textarea"
READY = f"!!document.querySelector({json.dumps(BOX)})"


@dataclass
class Visitor:
    """A tab with the page in it.

    Attributes:
        tab: The tab.
    """

    tab: Tab

    @classmethod
    def come(
        cls, browser: Browser, url: str, blank: Path, *, language: str = "en-US", **window: Any
    ) -> Visitor:
        """Open the page in a window of its own."""
        blank.write_text("<!doctype html><title>blank</title>", encoding="utf-8")
        tab = Tab.open(browser, blank, **window)
        headers = {"Accept-Language": language}
        tab.call("Network.setExtraHTTPHeaders", headers=headers)
        browser.events.clear()
        tab.call("Page.navigate", url=url)
        browser.wait_for("Page.loadEventFired", tab.session)
        return cls(tab)

    def look(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.tab.evaluate(expression)

    def wait(self, expression: str, seconds: float = SECONDS) -> Any:
        """The value of an expression once it is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            # Between two pages there is no document; what asks for its parts fails then.
            with contextlib.suppress(BrowserError):
                if value := self.look(expression):
                    return value
            time.sleep(0.05)
        text = self.look("document.body.innerText")
        raise AssertionError(f"never came true: {expression}\nThe page says:\n{text}")

    def text(self, selector: str) -> str:
        """What stands in the elements of a selector."""
        code = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return str(self.look(f"{code}.map(each => each.innerText).join('\\n')"))

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a selector whose text contains ``text``."""
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            f".find(each => each.innerText.includes({json.dumps(text)}))"
        )
        self.wait(f"!!({found})")
        self.look(f"({found}).click()")

    def write(self, text: str, selector: str = BOX) -> None:
        """Type a text in place of what stands there."""
        self.look(
            f"(e => {{ e.focus(); e.select() }})(document.querySelector({json.dumps(selector)}))"
        )
        self.tab.call("Input.insertText", text=text)

    def send(self) -> None:
        """Press Enter."""
        self.look(f"document.querySelector({json.dumps(BOX)}).focus()")
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.tab.call("Input.dispatchKeyEvent", type=kind, **key)

    def upload(self, files: Sequence[Path]) -> None:
        """Choose files, and wait until the page has them."""
        before = self.pictures_in_box
        root = self.tab.call("DOM.getDocument")["root"]["nodeId"]
        selector = "#question input[type=file]"
        node = self.tab.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        names = [str(file) for file in files]
        self.tab.call("DOM.setFileInputFiles", nodeId=node, files=names)
        self.wait(f"{THUMBNAILS} == {before + len(files)}")

    def paste(self, data: bytes, name: str = "pasted.png") -> None:
        """Paste a picture, and wait until the page has it."""
        before = self.pictures_in_box
        self.look(
            "(() => { const data = new DataTransfer();"
            f"data.items.add(new File([new Uint8Array({list(data)})], {json.dumps(name)},"
            "{type: 'image/png'}));"
            f"document.querySelector({json.dumps(BOX)}).dispatchEvent("
            "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})) })()"
        )
        self.wait(f"{THUMBNAILS} == {before + 1}")

    @property
    def pictures_in_box(self) -> int:
        """Pictures that go with the next question."""
        return int(self.look(THUMBNAILS))


THUMBNAILS = "document.querySelectorAll('#question .thumbnail-item').length"
