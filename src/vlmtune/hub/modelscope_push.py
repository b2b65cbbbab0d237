"""Pushing to ModelScope, through its library if that is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import httpx2

import vlmtune
from vlmtune.hub.messages import (
    TIMEOUT_S,
    Hub,
    first_line,
    may_not_write,
    not_logged_in,
    push_refused,
    push_unreachable,
)
from vlmtune.hub.modelscope import newest_commit, require_library
from vlmtune.hub.push_files import local_hashes, require_arrived, require_private, stale_files

HUB: Hub = "modelscope"
_BRANCH = "master"


def require_modelscope_login(repo: str) -> None:
    """Raise unless the library is there, the hub can be reached and knows who is logged in."""
    api = _api()
    with _explained(repo):
        api.whoami()


def push_modelscope(folder: Path, repo: str, private: bool) -> tuple[str, str]:
    """Send a folder; returns the commit that holds it and the page's address."""
    api = _api()
    local = local_hashes(folder)
    message = f"vlmtune {vlmtune.__version__}"
    with _explained(repo):
        _make(api, repo, private)
        # No record of the upload: it would lie in the model's folder. What is there is not resent.
        api.upload_folder(
            repo, "model", folder, commit_message=message, use_cache=False, disable_tqdm=True
        )
        stale = stale_files(_files(api, repo), local)
        if stale:
            api.delete_files(repo, "model", stale, commit_message=message)
        files = _files(api, repo)
        remote = {name: entry.get("Sha256") or None for name, entry in files.items()}
        require_arrived(local, remote, repo, HUB)
        return newest_commit(files.values(), _BRANCH), f"{api.legacy.endpoint}/models/{repo}"


def _api() -> Any:
    require_library("Pushing to ModelScope")
    import modelscope_hub

    config = modelscope_hub.HubConfig()  # end point and token from its own environment and log-in
    if not config.token:
        raise not_logged_in(HUB, "there is no token")
    return modelscope_hub.HubApi(config=config)


def _make(api: Any, repo: str, private: bool) -> None:
    """Make the repository, or find the one that is there."""
    import modelscope_hub

    try:
        found = api.get_repo(repo, "model")
    except modelscope_hub.NotExistError:
        # Left out, its library would say that the model stands under the Apache licence.
        api.create_repo(
            repo, "model", visibility="private" if private else "public", license="Other"
        )
        return
    require_private(private, found.visibility == modelscope_hub.Visibility.PRIVATE, repo, HUB)


def _files(api: Any, repo: str) -> dict[str, dict[str, Any]]:
    entries = api.legacy.list_repo_files(repo, "model", _BRANCH)
    return {entry["Path"]: entry for entry in entries if entry.get("Type") != "tree"}


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what the library raises into our errors, and keeps its prints off standard output."""
    import modelscope_hub

    endpoint = modelscope_hub.HubConfig().endpoint
    try:
        # Its library tries for up to a minute before it says that there is no network.
        httpx2.head(endpoint, timeout=TIMEOUT_S)
        with redirect_stdout(sys.stderr):
            yield
    except modelscope_hub.AuthenticationError as error:
        raise not_logged_in(HUB, "its token is not valid") from error
    except modelscope_hub.PermissionDeniedError as error:
        raise may_not_write(repo, HUB) from error
    except (httpx2.TransportError, modelscope_hub.NetworkError) as error:
        raise push_unreachable(repo, HUB, type(error).__name__) from error
    except (modelscope_hub.HubError, RuntimeError) as error:
        raise push_refused(repo, HUB, first_line(error)) from error
