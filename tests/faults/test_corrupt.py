"""Whatever happens to a file of a checkpoint is found before anything of it is loaded."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path

import pytest

from tiny_world import copied
from vlmtune.errors import CheckpointError
from vlmtune.runs.checkpoints import MANIFEST, checkpoints, faults, newest_good

pytestmark = pytest.mark.faults

FLIPS, TRUNCATIONS = 1_000, 200


@pytest.fixture
def saved(lora_run: Path, tmp_path: Path) -> Path:
    """A copy of a run's checkpoints, of steps 2, 4 and 6."""
    return copied(lora_run / "checkpoints", tmp_path / "checkpoints")


def flip(path: Path, bit: int) -> None:
    """Turn one bit over, in place; again, and it is as it was."""
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        value = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([value ^ 1 << bit % 8]))


def test_every_flipped_bit_is_found(saved):
    """1,000 of them, spread over every file; the manifest's every letter counts too."""
    newest = checkpoints(saved)[-1]
    files, rng = sorted(path for path in newest.iterdir()), random.Random(1)
    found, by_size = Counter(), 0
    for number in range(FLIPS):
        path = files[number % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        (fault, *others) = faults(newest)
        assert fault.startswith(f"{path.name}:") or path.name == MANIFEST, (path.name, bit, fault)
        assert not others or path.name == MANIFEST
        by_size += bool(faults(newest, hashed=False))
        found[path.name] += 1
        flip(path, bit)
    assert faults(newest) == []
    assert len(found) == len(files) >= 7
    assert sum(found.values()) == FLIPS
    # Negative control: whoever compares sizes alone misses what is not the manifest's own damage.
    assert by_size <= found[MANIFEST]


def test_every_truncation_is_found(saved):
    """200 of them, from nothing left to one byte missing."""
    newest = checkpoints(saved)[-1]
    files, rng = sorted(path for path in newest.iterdir()), random.Random(2)
    for number in range(TRUNCATIONS):
        path = files[number % len(files)]
        content = path.read_bytes()
        length = (0, len(content) - 1, rng.randrange(len(content)))[number // len(files) % 3]
        path.write_bytes(content[:length])
        assert faults(newest), (path.name, length)
        path.write_bytes(content)
    assert faults(newest) == []


def test_the_one_before_is_taken_with_a_warning(saved, caplog):
    """For damage in each of its files; with every checkpoint damaged nothing begins silently."""
    older, newest = checkpoints(saved)[-2:]
    for path in sorted(newest.iterdir()):
        caplog.clear()
        flip(path, 8 * (path.stat().st_size // 2))
        with caplog.at_level(logging.WARNING):
            assert newest_good(saved) == older
        assert newest.name in caplog.text
        assert path.name in caplog.text or path.name == MANIFEST  # it may name another file
        flip(path, 8 * (path.stat().st_size // 2))
        assert newest_good(saved) == newest  # the control
    for folder in checkpoints(saved):
        flip(folder / "optimizer.safetensors", 800)
    with pytest.raises(CheckpointError, match="all 3 checkpoints"):
        newest_good(saved)
