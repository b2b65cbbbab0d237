"""Sending a model folder to a hub, and the proof that it arrived whole.

Log-in is the hubs' own libraries' business: a token is never asked for, kept or shown here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmtune.errors import HubError, RefusedError, UsageError
from vlmtune.hub.huggingface_push import push_huggingface, require_huggingface_login
from vlmtune.hub.messages import Hub
from vlmtune.hub.modelscope_push import push_modelscope, require_modelscope_login

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BY_HAND: dict[Hub, str] = {"huggingface": "hf upload", "modelscope": "modelscope upload"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a model is pushed to.

    Attributes:
        repo: ``owner/name``; made if it is not there.
        hub: Which hub.
        private: Whether only its owner may see it. Without it a new repository is what the hub
            makes by default, and one that exists stays what it is.
    """

    repo: str
    hub: Hub = "huggingface"
    private: bool = False


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was pushed.

    Attributes:
        hub: Where to.
        repo: ``owner/name``.
        revision: The commit that holds it.
        url: Its page.
    """

    hub: Hub
    repo: str
    revision: str
    url: str


def require_pushable(destination: Destination) -> None:
    """Find out at once, before anything that takes long, that a push would be refused.

    Raises:
        UsageError: The name is none.
        MissingExtraError: The hub's library is not installed.
        HubError: Nobody is logged in, or the hub cannot be reached.
    """
    if not _NAME.fullmatch(destination.repo):
        raise UsageError(f"--push: found {destination.repo!r}, expected OWNER/NAME on a hub")
    if destination.hub == "modelscope":
        require_modelscope_login(destination.repo)
    else:
        require_huggingface_login(destination.repo)


def push_folder(folder: Path, destination: Destination) -> Pushed:
    """Send a folder's files as the repository's newest commit, and compare what arrived.

    An existing repository keeps its history and its other documents; files of another model (older
    shards, an adapter) are taken out of the newest commit, so that it holds this model alone.

    Raises:
        HubError: Not logged in, not allowed, not reachable, or what arrived is not what was sent.
        RefusedError: It was to be private, and the repository is public already.
    """
    push = push_modelscope if destination.hub == "modelscope" else push_huggingface
    try:
        revision, url = push(folder, destination.repo, destination.private)
    except (HubError, RefusedError) as error:
        by_hand = f"{_BY_HAND[destination.hub]} {destination.repo} {folder}"
        raise type(error)(
            f"{error} The model itself is whole, in {folder}; `{by_hand}` sends it once that is "
            "mended"
        ) from error
    return Pushed(destination.hub, destination.repo, revision, url)
