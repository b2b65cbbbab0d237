"""Hugging Face: models and the commit of a data set, through huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2  # the client that huggingface_hub uses: its connection errors pass through
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlmtune.errors import HubError
from vlmtune.hub.files import Snapshot, copied, require_complete, wanted_files
from vlmtune.hub.messages import (
    TIMEOUT_S,
    Hub,
    Kind,
    first_line,
    not_allowed,
    not_found,
    unreachable,
)

UNREACHABLE = (httpx2.TransportError, OfflineModeIsEnabled)


def huggingface_model(
    model_id: str, revision: str | None, out: Path | None
) -> tuple[Snapshot, Callable[[str], None] | None]:
    """The model's snapshot, and how to fetch one of its files again (None: offline)."""
    api = huggingface_hub.HfApi()
    with explained(model_id, "model", revision):
        try:
            info = api.model_info(
                model_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except (*UNREACHABLE, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return _huggingface_cached(model_id, revision, out, error), None
        commit = str(info.sha)
        known = {
            sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            for sibling in info.siblings or ()
        }
        names = wanted_files(known, model_id)
        folder = huggingface_hub.snapshot_download(
            model_id, revision=commit, local_dir=out, allow_patterns=names, etag_timeout=TIMEOUT_S
        )
        api.resolve_revision(model_id, revision=revision)  # remembers branch -> commit, for offline

        def refetch(name: str) -> None:
            with explained(model_id, "model", revision):
                huggingface_hub.hf_hub_download(
                    model_id, name, revision=commit, local_dir=out, force_download=True
                )

        return Snapshot(Path(folder), commit, {name: known[name] for name in names}), refetch


def _huggingface_cached(
    model_id: str, revision: str | None, out: Path | None, reason: Exception
) -> Snapshot:
    """The snapshot in the hub's cache; copied to ``out`` if that is given."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                model_id,
                revision=revision,
                local_files_only=True,
                allow_patterns="*config.json",  # the folder; what it must hold is asked below
                ignore_patterns="*/*",
            )
        )
    except LocalEntryNotFoundError as missing:
        offline = isinstance(reason, OfflineModeIsEnabled)
        why = "offline mode is set" if offline else type(reason).__name__
        raise unreachable(model_id, "model", "huggingface", f"({why})") from missing
    known: dict[str, str | None]
    try:
        tree = huggingface_hub.get_cached_repo_tree(model_id, revision=folder.name)
        known = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree}
    except CachedRepoTreeNotFoundError:
        # Fetched by another program. A cached file is a link to a blob whose name is its hash.
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        known = {name: _blob_name(folder / name) for name in names if (folder / name).is_file()}
    files = {name: known[name] for name in wanted_files(known, model_id)}
    require_complete(folder, files, model_id, "model", "huggingface")
    return Snapshot(copied(folder, files, out), folder.name, files)


def _blob_name(path: Path) -> str | None:
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def dataset_commit(name: str, revision: str | None) -> str:
    """The commit that a data set's revision points to."""
    with explained(name, "dataset", revision):
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S)
        return str(info.sha)


def dataset_cache(name: str) -> Path:
    """The folder in the hub's cache that holds a data set's files."""
    return Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"


@contextmanager
def explained(name: str, kind: Kind, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors."""
    hub: Hub = "huggingface"
    try:
        yield
    except RevisionNotFoundError as error:
        raise not_found(name, kind, hub, revision) from error
    except GatedRepoError as error:
        raise not_allowed(name, kind, hub) from error
    except RepositoryNotFoundError as error:
        raise not_found(name, kind, hub, None) from error
    except HFValidationError as error:
        raise HubError(
            f"{name!r} is not a name on a hub: expected owner/name, found {first_line(error)}. "
            "For a local folder, check that it exists."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise not_allowed(name, kind, hub) from error
        raise unreachable(name, kind, hub, f"(it answered {status})") from error
    except (*UNREACHABLE, LocalEntryNotFoundError) as error:
        raise unreachable(name, kind, hub, f"({type(error).__name__})") from error
