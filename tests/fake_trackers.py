"""Trackers for the tests: each runs in a process of its own, as real ones do, and writes down its
calls where the test can read them. They are named by ``module:class``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

KEY = "0123456789abcdef0123456789abcdef"


class Healthy:
    """Writes every call into ``calls.jsonl``."""

    def __init__(self, opening):
        self.file = Path(opening.folder) / "calls.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.place = "https://tracker.example/run"
        self.reach("open", **{name: getattr(opening, name) for name in opening.__slots__})

    def reach(self, call, **what):
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"call": call, **what}) + "\n")
        self.trouble(call)

    def trouble(self, call):
        pass

    def log(self, step, values):
        self.reach("log", step=step, values=dict(values))

    def show(self, step, rows):
        self.reach("show", step=step, captions=[row.prediction for row in rows])

    def finish(self):
        self.reach("finish")


class Trouble(Healthy):
    """Does at one call (the name after the last ``_`` of the class) what it should not."""

    def trouble(self, call):
        how, _, where = type(self).__name__.lower().partition("_")
        if call == where:
            getattr(self, how)()

    def fails(self):
        raise RuntimeError(f"no\nnetwork for api key {KEY}")

    def hangs(self):
        time.sleep(600)

    def exits(self):
        sys.exit(3)

    def dies(self):
        os._exit(9)


class OnlyOffline(Healthy):
    """Knows nobody, as a service without a log-in does."""

    def trouble(self, call):
        mode = json.loads(self.file.read_text(encoding="utf-8").splitlines()[-1]).get("mode")
        if call == "open" and mode != "offline":
            raise RuntimeError("nobody is logged in")


class HangsOnline(Healthy):
    """Opens only offline, and otherwise not at all."""

    def trouble(self, call):
        mode = json.loads(self.file.read_text(encoding="utf-8").splitlines()[-1]).get("mode")
        if call == "open" and mode != "offline":
            time.sleep(600)


class Rude(Healthy):
    """Prints, asks, and leaves a handler for the end of the program that never returns."""

    def trouble(self, call):
        import atexit

        print("what the program itself prints is not for this", file=sys.stdout)
        print("nor is this", file=sys.stderr)
        if call == "open":
            atexit.register(time.sleep, 600)
            try:
                answer = input("api key? ")
            except EOFError:
                answer = None
            self.reach("asked", answer=answer, terminal=_terminal())


def _terminal():
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


for place in ("open", "log", "show", "finish"):
    for trouble in ("Fails", "Hangs", "Exits", "Dies"):
        name = f"{trouble}_{place}"
        vars()[name] = type(name, (Trouble,), {})
