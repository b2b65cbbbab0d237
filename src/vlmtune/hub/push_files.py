"""What a push sends, what it takes out, and whether it arrived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from vlmtune.errors import HubError, RefusedError
from vlmtune.hub.files import NEEDED, PICKLED, hashes
from vlmtune.hub.messages import Hub

# In a repository that exists: what its owner or the hub put there and no model is read from.
KEPT = ("README*", "LICENSE*", "configuration.json")


def local_hashes(folder: Path) -> dict[str, tuple[str, str]]:
    """Every file of a folder with its sha256 and the id that git would give it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashes(path) for path in paths}


def stale_files(remote: Iterable[str], local: Iterable[str]) -> list[str]:
    """Files of another model in the repository's top folder, which would be loaded with ours."""
    ours = set(local)
    return sorted(
        name
        for name in remote
        if name not in ours
        and "/" not in name
        and any(fnmatchcase(name, pattern) for pattern in (*NEEDED, *PICKLED))
        and not any(fnmatchcase(name, pattern) for pattern in KEPT)
    )


def require_arrived(
    local: Mapping[str, tuple[str, str]], remote: Mapping[str, str | None], repo: str, hub: Hub
) -> None:
    """Raise unless the hub holds every file with the bytes that were sent.

    Args:
        local: What ``local_hashes`` found.
        remote: Each file's hash by the hub: a sha256 or a git blob's id; None where it gives none.
        repo: ``owner/name``, for the message.
        hub: Which hub, for the message.
    """
    wrong = [
        name for name, known in local.items() if name not in remote or not _is(remote[name], known)
    ]
    if wrong:
        raise HubError(
            f"{len(wrong)} of {len(local)} files of {repo} on {hub} are not those that were sent "
            f"(first: {wrong[0]}): do not use that revision. Check proxy and disk, and push again."
        )


def _is(found: str | None, known: tuple[str, str]) -> bool:
    return found is None or found in known


def require_private(asked: bool, private: bool | None, repo: str, hub: Hub) -> None:
    """Raise if a push that was to be private would be public."""
    if asked and not private:
        raise RefusedError(
            f"--private: {repo} on {hub} is there already and is not private, so that everybody "
            "would see what is pushed. Nothing was sent. Make it private on its page, or push to "
            "another name."
        )
