"""ModelScope: models and data sets, through its library if that is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx2

from vlmtune.errors import HubError, MissingExtraError
from vlmtune.hub.files import Snapshot, copied, data_files, require_complete, wanted_files
from vlmtune.hub.messages import TIMEOUT_S, Kind, first_line, not_allowed, not_found, unreachable


def modelscope_snapshot(
    name: str, kind: Kind, revision: str | None, out: Path | None
) -> tuple[Snapshot, Callable[[str], None] | None]:
    """A repository's snapshot, and how to fetch one of its files again (None: offline)."""
    require_library("Fetching from ModelScope")
    import modelscope_hub

    branch = revision or "master"
    config = modelscope_hub.HubConfig()  # end point, token and cache from its own environment
    api = modelscope_hub.HubApi(config=config)
    try:
        # Its library tries for 22 to 60 s before it says that there is no network.
        httpx2.head(config.endpoint, timeout=TIMEOUT_S)
        endpoint = api.resolve_endpoint_for_read(name, repo_type=kind)
        api = modelscope_hub.HubApi(config=config, endpoint=endpoint)
        entries = api.legacy.list_repo_files(name, kind, branch)
        known = {e["Path"]: e.get("Sha256") or None for e in entries if e.get("Type") != "tree"}
        commit = newest_commit(entries, branch)
        names = wanted_files(known, name) if kind == "model" else data_files(known)
        folder = Path(
            api.download_repo(name, kind, revision=branch, local_dir=out, allow_patterns=names)
        )
    except httpx2.TransportError as error:
        return _modelscope_cached(api, name, kind, branch, out, error), None
    except modelscope_hub.NotExistError as error:
        raise not_found(name, kind, "modelscope", revision) from error
    except (modelscope_hub.AuthenticationError, modelscope_hub.PermissionDeniedError) as error:
        raise not_allowed(name, kind, "modelscope") from error
    except modelscope_hub.NetworkError as error:
        raise unreachable(name, kind, "modelscope", "(the connection broke)") from error
    except modelscope_hub.FileDownloadError as error:
        failed = ", ".join(sorted(error.failed_files))
        raise HubError(
            f"{failed} of {name} on modelscope did not arrive with the bytes that the hub "
            "announces, or not at all. Check proxy and disk, and download again: what arrived "
            "is kept."
        ) from error
    except modelscope_hub.HubError as error:
        raise HubError(f"modelscope refused {name}: {first_line(error)}") from error
    files = {path: known[path] for path in names}
    if out is None:
        record = {"revision": commit, "files": files}
        _record_of(folder).write_text(json.dumps(record), encoding="utf-8")
    return Snapshot(folder, commit, files), lambda path: _modelscope_again(
        api, name, kind, branch, folder / path, path
    )


def require_library(needed_for: str) -> None:
    """Raise unless ModelScope's library is installed."""
    if importlib.util.find_spec("modelscope_hub") is None:
        raise MissingExtraError("modelscope", "modelscope", needed_for)


def newest_commit(entries: Iterable[Mapping[str, Any]], branch: str) -> str:
    """The last commit that touched a file: the state of all files. The hub itself names no head."""
    newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
    return str(newest.get("Revision") or branch)


def _modelscope_again(
    api: Any, name: str, kind: Kind, branch: str, target: Path, path: str
) -> None:
    target.unlink(missing_ok=True)
    fetched = Path(api.download_file(name, kind, path, revision=branch))
    if fetched != target:
        shutil.copyfile(fetched, target)


def _modelscope_cached(
    api: Any, name: str, kind: Kind, branch: str, out: Path | None, reason: Exception
) -> Snapshot:
    import modelscope_hub

    try:
        folder = Path(api.download_repo(name, kind, revision=branch, local_files_only=True))
    except modelscope_hub.CacheError as missing:
        raise unreachable(name, kind, "modelscope", f"({type(reason).__name__})") from missing
    record = _record_of(folder)
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
    else:  # fetched by another program: neither commit nor hashes are known
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = {path.relative_to(folder).as_posix(): None for path in paths}
        wanted = wanted_files(names, name) if kind == "model" else data_files(names)
        known = {"revision": branch, "files": dict.fromkeys(wanted)}
    require_complete(folder, known["files"], name, kind, "modelscope")
    return Snapshot(copied(folder, known["files"], out), known["revision"], known["files"])


def _record_of(folder: Path) -> Path:
    """Where commit and hashes of a ModelScope snapshot stand: its cache keeps neither."""
    return folder.parent / f".{folder.name}.vlmtune.json"
