"""No garbage is looked for while much is loaded; all of it can be collected afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from vlmtune.garbage import without_collecting


class Cycle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_nothing_is_collected_meanwhile_and_everything_afterwards():
    with without_collecting():
        assert not gc.isenabled()
        with without_collecting():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the outer one ends it
        gone = weakref.ref(Cycle())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None
    # Negative control: frozen for good, it stays.
    kept = weakref.ref(Cycle())
    gc.freeze()
    try:
        gc.collect()
        assert kept() is not None
    finally:
        gc.unfreeze()
    gc.collect()
    assert kept() is None


def test_an_error_passes_and_it_is_as_before():
    with pytest.raises(KeyError), without_collecting():
        raise KeyError
    assert gc.isenabled()


def test_what_others_have_set_stays():
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with without_collecting():
            pass
        assert gc.get_freeze_count() > frozen // 2  # a few have died since
    finally:
        gc.unfreeze()
