"""Which files of a repository are fetched, and the proof that they arrived."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from vlmtune.errors import HubError
from vlmtune.hub.messages import Hub, Kind, unreachable

NEEDED = (
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README*", "LICENSE*",
)  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
# Of a data set everything is fetched but code and pickles: media may lie beside its tables.
NEVER_FROM_DATA = ("*.py", "*.pyc", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.bin")

_ATTEMPTS = 3  # fetches of a file whose hash is wrong


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files as a hub sent them, and what it says they should be."""

    folder: Path
    revision: str
    files: Mapping[str, str | None]  # path -> hash that the hub gives (sha256, or a git blob's id)


def wanted_files(names: Iterable[str], model_id: str) -> list[str]:
    """Those of a model repository's files that are needed: its top folder's, and more templates.

    Raises:
        HubError: The weights are there only in a format that must be unpickled.
    """
    top = [name for name in names if "/" not in name or name.startswith("additional_chat_templ")]
    wanted = [name for name in top if any(fnmatchcase(name, pattern) for pattern in NEEDED)]
    weights = [name for name in wanted if name.endswith(".safetensors")]
    if not weights and any(fnmatchcase(name, pattern) for name in top for pattern in PICKLED):
        raise HubError(
            f"{model_id} holds its weights only in a pickled format, which can run code when it is "
            "read: weights must be safetensors and nothing is unpickled. Look for a conversion of "
            "this model, or convert it yourself where you trust it and give the folder as "
            "model.base."
        )
    if any(not name.startswith("consolidated") for name in weights):
        # Some publishers put a second copy of all weights, in their own layout, beside the first.
        wanted = [name for name in wanted if not fnmatchcase(name, "consolidated*.safetensors")]
    return wanted


def verified(
    snapshot: Snapshot, name: str, refetch: Callable[[str], None] | None, what: str
) -> str:
    """The file's sha256, after as many fetches as it takes to get what the hub announces."""
    path, expected = snapshot.folder / name, snapshot.files[name]
    for attempt in range(_ATTEMPTS):
        digest, blob_id = hashes(path)
        if expected in (None, digest, blob_id):
            return digest
        if refetch is not None and attempt < _ATTEMPTS - 1:
            refetch(name)
    path.resolve().unlink(missing_ok=True)  # what it points to in the cache, and the link itself:
    path.unlink(missing_ok=True)  # nobody shall find wrong weights under the right name
    fetched = "" if refetch is None else f" {_ATTEMPTS} times"
    raise HubError(
        f"{name} of {what} arrived with wrong bytes{fetched}: hash {digest} found, {expected} "
        "expected. The file was removed; check proxy and disk, and download again."
    )


def hashes(path: Path) -> tuple[str, str]:
    """The sha256 of a file, and the id that git gives it: small files are known by the latter."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    small = path.stat().st_size < 1 << 25  # git blobs are; weights need not be read for it
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            if small:
                blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def copied(folder: Path, names: Iterable[str], out: Path | None) -> Path:
    """The folder with the files: ``folder`` itself, or ``out`` with copies of them."""
    if out is None:
        return folder
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return out


def require_complete(folder: Path, names: Iterable[str], what: str, kind: Kind, hub: Hub) -> None:
    """Raises unless the cached files, and all shards that their index names, are there."""
    needed = set(names)
    for index in folder.glob("*.safetensors.index.json"):
        needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing or not needed:
        raise unreachable(what, kind, hub, "and only a part of it is in the cache")


def data_files(names: Iterable[str]) -> list[str]:
    """All files of a data set repository that cannot run code."""
    return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in NEVER_FROM_DATA)]
