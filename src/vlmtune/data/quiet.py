"""Keeps Pillow's warnings about damaged files from the user: such files get an error of ours."""

from __future__ import annotations

import threading
import warnings

from PIL import Image


class _Quiet:
    """Silences Pillow's warnings while any thread decodes.

    ``warnings.catch_warnings`` alone is not for threads: two that overlap restore each other's
    filters. Here the first thread in saves the filters and the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"(PIL|vlmtune\.data\.media)\b")
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


quiet = _Quiet()
