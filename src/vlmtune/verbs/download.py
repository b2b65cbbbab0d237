"""``download``: a model into a folder, with a note of where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.files import write_json
from vlmtune.hub import Hub, download_model
from vlmtune.runs.resolve import ORIGIN


def download(
    model: str, out: str | Path, *, hub: Hub = "huggingface", revision: str | None = None
) -> dict[str, Any]:
    """Fetch a model, verify it, and note its revision beside it.

    Args:
        model: Hub id.
        out: Folder for the files.
        hub: Which hub.
        revision: Branch, tag or commit.

    Returns:
        The keys of ``vlmtune download --json``.
    """
    done = download_model(model, hub=hub, revision=revision, out=Path(out))
    write_json(done.path / ORIGIN, {"id": model, "hub": hub, "revision": done.revision})
    return {
        "path": str(done.path),
        "revision": done.revision,
        "bytes": done.bytes,
        "sha256": done.sha256,
    }
