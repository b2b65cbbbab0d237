"""What a browser may send as an event: no file but those that this page has made or been given.

Gradio opens whatever an event calls a file: it checks a path only in pages that it launches itself,
which a mounted one is not, and fetches an address. Both are refused before it sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Message, Receive

MAX_EVENT_BYTES = 8 * 2**20  # a long text, each character escaped


class BadEventError(Exception):
    """An event that the page itself does not send."""


def check_event(body: bytes, folder: Path) -> None:
    """Refuse an event that names a file outside a folder.

    Args:
        body: JSON.
        folder: Where uploads and pictures lie.

    Raises:
        BadEventError: If it does, or is no plain JSON.
    """
    root = folder.resolve()

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        # Every pair is seen, also one whose key comes twice.
        for key, value in found:
            if key == "path" and not _lies_in(value, root):
                raise BadEventError("a file that was not uploaded here")
        return dict(found)

    try:
        json.loads(body, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        raise BadEventError("no plain JSON") from None


async def read_body(receive: Receive, most: int) -> bytes:
    """A request's body.

    Raises:
        BadEventError: If it is larger than ``most`` bytes, or the client leaves.
    """
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > most:
            raise BadEventError("too large, or not whole")
        if not message.get("more_body"):
            return bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, once more."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _lies_in(value: Any, root: Path) -> bool:
    if value is None:
        return True
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        return Path(value).is_absolute() and Path(value).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a name too long, a link that goes round
        return False
