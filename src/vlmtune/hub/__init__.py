"""The only place that talks to a model or data hub (Hugging Face, ModelScope).

Only files that cannot run code are fetched, the commit is pinned before the first byte, and every
file is compared with the hash that the hub gives for it. The hub libraries read their own
environment (end point, token, cache, offline mode); nothing of it passes through our messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.hub.files import verified
from vlmtune.hub.huggingface import dataset_cache, dataset_commit, explained, huggingface_model
from vlmtune.hub.messages import Hub
from vlmtune.hub.modelscope import modelscope_snapshot
from vlmtune.hub.rows import rows_of

__all__ = ["Downloaded", "Hub", "download_model", "load_dataset_records"]


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A model as it lies on disk, with everything needed to say later what it was.

    Attributes:
        path: The folder with the files.
        revision: The commit that the requested revision pointed to.
        hub: Where it came from.
        bytes: Size of the files together.
        sha256: Over the lines ``<sha256 of file>  <path>``, in the order of the paths.
    """

    path: Path
    revision: str
    hub: Hub
    bytes: int
    sha256: str


def download_model(
    model_id: str, *, hub: Hub = "huggingface", revision: str | None = None, out: Path | None = None
) -> Downloaded:
    """Fetches a model's files, or finds them in the hub's cache, and proves that they are right.

    Without a network a model that is in the cache is used as it is.

    Args:
        model_id: ``owner/name``.
        hub: Which hub to ask.
        revision: A branch, tag or commit; the hub's main branch unless given.
        out: A folder to put the files in; the hub's own cache unless given.

    Raises:
        HubError: Not reachable, not there, not allowed, only pickled weights, or wrong bytes.
        MissingExtraError: ``hub`` is ModelScope and its library is not installed.
    """
    if hub == "modelscope":
        snapshot, refetch = modelscope_snapshot(model_id, "model", revision, out)
    else:
        snapshot, refetch = huggingface_model(model_id, revision, out)
    digests = {
        name: verified(snapshot, name, refetch, f"{model_id} on {hub}")
        for name in sorted(snapshot.files)
    }
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return Downloaded(
        path=snapshot.folder,
        revision=snapshot.revision,
        hub=hub,
        bytes=sum((snapshot.folder / name).stat().st_size for name in digests),
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def load_dataset_records(
    name: str,
    *,
    hub: Hub = "huggingface",
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> tuple[Iterator[dict[str, Any]], str]:
    """Rows of a data set on a hub; no code of the data set is ever run.

    Args:
        name: ``owner/name``.
        hub: Which hub to ask.
        subset: Name of the configuration, where the data set has several.
        split: ``train`` unless given.
        revision: A branch, tag or commit.
        streaming: Read while iterating instead of fetching all first (Hugging Face only): for the
            first few rows of a large data set.

    Returns:
        The rows, with pictures as ``{"bytes": encoded bytes, "path": file name}``, and the commit.

    Raises:
        HubError: Not reachable, not there, not allowed, or without the subset or split.
        MissingExtraError: ``hub`` is ModelScope and its library is not installed.
    """
    if hub == "modelscope":
        snapshot, refetch = modelscope_snapshot(name, "dataset", revision, None)
        for path in snapshot.files:
            verified(snapshot, path, refetch, f"{name} on {hub}")
        folder = str(snapshot.folder)
        return rows_of(name, folder, subset, split, trusted=(folder,)), snapshot.revision
    commit = dataset_commit(name, revision)
    with explained(name, "dataset", revision):
        rows = rows_of(
            name,
            name,
            subset,
            split,
            trusted=(f"hf://datasets/{name}@{commit}/", str(dataset_cache(name))),
            revision=commit,
            streaming=streaming,
        )
    return rows, commit
