"""Pushing to Hugging Face, through huggingface_hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

import vlmtune
from vlmtune.errors import HubError
from vlmtune.hub.huggingface import UNREACHABLE
from vlmtune.hub.messages import (
    TIMEOUT_S,
    Hub,
    first_line,
    may_not_write,
    not_logged_in,
    push_refused,
    push_unreachable,
)
from vlmtune.hub.push_files import local_hashes, require_arrived, require_private, stale_files

HUB: Hub = "huggingface"


def require_huggingface_login(repo: str) -> None:
    """Raise unless the hub can be reached and knows who is logged in."""
    with _explained(repo):
        huggingface_hub.HfApi().whoami()


def push_huggingface(folder: Path, repo: str, private: bool) -> tuple[str, str]:
    """Send a folder; returns the commit that holds it and the page's address."""
    api = huggingface_hub.HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        found = api.model_info(repo, timeout=TIMEOUT_S)
        require_private(private, found.private, repo, HUB)
        local = local_hashes(folder)
        stale = stale_files((sibling.rfilename for sibling in found.siblings or ()), local)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"vlmtune {vlmtune.__version__}",
            delete_patterns=[glob.escape(name) for name in stale] or None,
        )
        sent = api.model_info(repo, revision=commit.oid, files_metadata=True, timeout=TIMEOUT_S)
        remote = {
            sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            for sibling in sent.siblings or ()
        }
        require_arrived(local, remote, repo, HUB)
        return str(commit.oid), f"{api.endpoint}/{repo}"


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises while pushing into our errors."""
    try:
        yield
    # HTTP errors are OSErrors; an upload's failure comes as a RuntimeError with its cause.
    except (OSError, RuntimeError, ValueError, *UNREACHABLE) as error:
        raise _meaning(error, repo) from error


def _meaning(error: BaseException, repo: str) -> HubError:
    if isinstance(error, HFValidationError):
        return push_refused(repo, HUB, f"no name on a hub ({first_line(error)})")
    if isinstance(error, LocalTokenNotFoundError):
        return not_logged_in(HUB, "there is no token")
    if isinstance(error, HfHubHTTPError):
        return _answered(error, repo)
    if isinstance(error, UNREACHABLE):
        return push_unreachable(repo, HUB, type(error).__name__)
    if error.__cause__ is not None:
        return _meaning(error.__cause__, repo)
    return push_refused(repo, HUB, " ".join(str(error).split()) or type(error).__name__)


def _answered(error: HfHubHTTPError, repo: str) -> HubError:
    status = error.response.status_code
    if status == 401:
        return not_logged_in(HUB, "its token is not valid")
    if status == 403 or isinstance(error, RepositoryNotFoundError):
        return may_not_write(repo, HUB)
    if status >= 500:
        return push_unreachable(repo, HUB, f"it answered {status}")
    said = " ".join((error.server_message or "").split())
    return push_refused(repo, HUB, f"it answered {status}" + (f", {said}" if said else ""))
