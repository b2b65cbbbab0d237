"""Checkpoints as they lie on the disk: listed, sealed, verified before they are read.

safetensors has no checksum (a flipped bit loads silently as a wrong weight), so a manifest with the
sha256 of every file is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

from vlmtune.errors import CheckpointError
from vlmtune.files import sync, to_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"^step-(\d{6,})$")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.match(path.name)]
    return sorted(found, key=step_of)


def faults(folder: Path, *, hashed: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files; empty if every one is as it was written.

    Args:
        folder: The checkpoint.
        hashed: Whether to read every file; otherwise only their sizes are looked at.
    """
    try:
        listed = _listed(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: damaged ({type(error).__name__}: {error})"]
    found = []
    for name, size, sha256 in listed:
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != size:
            found.append(f"{name}: {path.stat().st_size} bytes, {size} were written")
        elif hashed and _sha256(path) != sha256:
            found.append(f"{name}: its content changed since it was written")
    return found if listed else [f"{MANIFEST}: lists no files"]


def _listed(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and hash of every file, from a manifest that is to the letter as it was written.

    Raises:
        ValueError: If it is not: what a flipped bit makes of it may still be JSON.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    files = manifest["files"]
    written = {"format": FORMAT, "step": manifest["step"], "files": files}
    named = NAME.match(folder.name) is None or manifest["step"] == step_of(folder)
    if text != to_json(written) + "\n" or not named:
        raise ValueError("not what was written")
    if any(facts.keys() != {"bytes", "sha256"} for facts in files.values()):
        raise ValueError("not what was written")
    return [(name, int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()]


def newest_good(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, or None if there is none at all.

    Raises:
        CheckpointError: If there are checkpoints, and every one is damaged: starting afresh would
            throw work away silently.
    """
    candidates = checkpoints(folder)
    for path in reversed(candidates):
        problems = faults(path)
        if not problems:
            return path
        logger.warning("%s is damaged (%s); trying an earlier one", path, "; ".join(problems[:3]))
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {folder} are damaged; start anew in another "
            "folder with --run DIR"
        )
    return None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.match(path.name)
    assert match is not None
    return int(match[1])


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:06d}"


def seal(folder: Path, step: int) -> None:
    """Write a checkpoint's manifest, and make every file durable."""
    everything = sorted(folder.rglob("*"))
    files = [path for path in everything if path.is_file()]
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in files
    }
    for path in everything:
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(
        to_json({"format": FORMAT, "step": step, "files": listed}) + "\n", encoding="utf-8"
    )
    sync(manifest)
    sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
