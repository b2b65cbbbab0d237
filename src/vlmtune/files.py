"""Writing files so that a kill at any moment leaves either the old or the new one."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text with a stable order of keys and readable Unicode."""
    return json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once, and be sure that it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of a JSON value."""
    write_text(path, to_json(value) + "\n")


def sync(path: Path) -> None:
    """Put a file's content, or a folder's entries, on the disk: a rename alone does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim(folder: Path) -> int | None:
    """Make a folder and lock it; a killed holder lets go of it by itself.

    Returns:
        A descriptor to close when done, or None if another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if holds(descriptor, folder):
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)  # locked by another process, or published by it a moment ago
    return None


def holds(descriptor: int, folder: Path) -> bool:
    """Whether a claimed folder is still where it was: not published, not removed."""
    return folder.exists() and folder.stat().st_ino == os.fstat(descriptor).st_ino


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; a last line torn by a kill is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a JSONL file in one write."""
    text = "".join(to_json(record, indent=None) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)


def keep_lines_through(path: Path, step: int) -> None:
    """Drop the records of later steps, which a resumed run will write again."""
    write_lines(path, [record for record in read_lines(path) if record.get("step", 0) <= step])


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a JSONL file's content at once."""
    write_text(path, "".join(to_json(record, indent=None) + "\n" for record in records))
