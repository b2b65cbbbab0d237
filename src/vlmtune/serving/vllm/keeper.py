"""Starts a program and ends it, with all that it started, when whoever asked is gone.

Run by itself, as ``python keeper.py PROGRAM …``. The end of its standard input is the sign: a pipe
that the system closes however its other end dies, so that no engine is left holding a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 15.0  # seconds to end by oneself


def main() -> None:
    """Start what the arguments say, and exit with its status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asked
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        _end(child, signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            _end(child, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    _end(child, signal.SIGKILL)  # workers that outlived it
    sys.stdout.flush()
    os._exit(status if status >= 0 else 128 - status)


def _end(child: subprocess.Popen[bytes], sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, sign)


if __name__ == "__main__":
    main()
