"""When Python looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Look for no garbage meanwhile.

    For imports and for loading a model: they make some million objects, nearly all of which stay.
    Looking through them again and again takes a quarter of the time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what somebody froze stays frozen
            # All there is counts as old without being looked through, and can still be collected.
            gc.freeze()
            gc.unfreeze()
        gc.enable()
