"""The ``--push`` of a verb that makes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

from vlmtune.errors import UsageError
from vlmtune.hub import Hub
from vlmtune.hub.push import Destination, push_folder, require_pushable
from vlmtune.verbs.observer import Observer


def destination_of(push: str | None, hub: str, private: bool) -> Destination | None:
    """Where the options say to push, found possible before any long work; None: nowhere.

    Args:
        push: ``owner/name``, or None.
        hub: ``huggingface`` or ``modelscope``.
        private: Whether a new repository is to be private.

    Raises:
        UsageError: The options do not go together, or the name is none.
        HubError: Nobody is logged in, or the hub cannot be reached.
    """
    if hub not in get_args(Hub):
        raise UsageError(f"--push-hub: found {hub!r}, expected {' or '.join(get_args(Hub))}")
    if push is None:
        if private:
            raise UsageError("--private says how to push, but not where: add --push OWNER/NAME")
        return None
    destination = Destination(repo=push, hub=cast(Hub, hub), private=private)
    require_pushable(destination)
    return destination


def pushed(folder: Path, destination: Destination | None, observer: Observer) -> dict[str, Any]:
    """Push a folder and say so: ``{"pushed": {hub, repo, revision, url}}``, or nothing."""
    if destination is None:
        return {}
    observer.stage(f"pushing to {destination.hub}")
    done = push_folder(folder, destination)
    return {
        "pushed": {
            "hub": done.hub,
            "repo": done.repo,
            "revision": done.revision,
            "url": done.url,
        }
    }
