"""What a hub's refusal means for the user, and what to do next."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from vlmtune.errors import HubError

Hub: TypeAlias = Literal["huggingface", "modelscope"]
Kind: TypeAlias = Literal["model", "dataset"]

TIMEOUT_S = 8.0  # for one answer, not for a download
_OTHER: dict[Hub, Hub] = {"huggingface": "modelscope", "modelscope": "huggingface"}
_LOG_IN: dict[Hub, str] = {"huggingface": "hf auth login", "modelscope": "modelscope login"}
# What the hubs' tokens look like; ModelScope's are UUIDs, with "ms-" before them or not.
_TOKEN = re.compile(r"\b(hf_|api_org_)\w{6,}|\b(ms-)?[0-9a-f]{8}(-[0-9a-f]{4,12}){1,4}\b")


def unreachable(name: str, kind: Kind, hub: Hub, why: str) -> HubError:
    """No network, or a hub that is down."""
    if kind == "model":
        remedy = (
            f"give a local folder (model.base=DIR), run `vlmtune download {name} --hub {hub} "
            f"--out DIR` on a connected machine, or try the other hub (model.hub={_OTHER[hub]})"
        )
    else:
        remedy = f"give a local file or folder instead, or try the other hub (--hub {_OTHER[hub]})"
    return HubError(f"{hub} could not be reached for the {kind} {name} {why}: {remedy}.")


def not_found(name: str, kind: Kind, hub: Hub, revision: str | None) -> HubError:
    """No such repository, or (with ``revision``) no such revision of it."""
    if revision is not None:
        return HubError(
            f"The {kind} {name} on {hub} has no revision {revision!r}, or is not there. Leave the "
            "revision out for the newest, or give a branch, tag or commit of its page."
        )
    return HubError(
        f"There is no {kind} {name} on {hub}, or it is private. Check the spelling (owner/name), "
        f"log in if it is yours, try the other hub ({_OTHER[hub]}), or give a local folder."
    )


def not_allowed(name: str, kind: Kind, hub: Hub) -> HubError:
    """Gated, or private."""
    return HubError(
        f"{hub} does not let you fetch the {kind} {name}: it is gated or private. Ask for access "
        "on its page, log in with the hub's own command on this machine, and try again."
    )


def first_line(error: Exception) -> str:
    """A library's own words, as far as they fit into ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def not_logged_in(hub: Hub, why: str) -> HubError:
    """Nobody is logged in, or with a token that is not valid any more."""
    return HubError(
        f"{hub} does not know who is pushing: {why}. Log in on this machine with `{_LOG_IN[hub]}`, "
        "with a token that may write."
    )


def may_not_write(repo: str, hub: Hub) -> HubError:
    """Logged in, but not allowed to make or change this repository."""
    return HubError(
        f"{hub} does not let this login write to {repo}. Check the owner's name, or log in "
        f"(`{_LOG_IN[hub]}`) with a token that may write there."
    )


def push_refused(repo: str, hub: Hub, said: str) -> HubError:
    """The hub's own reason, which may quote what it was sent: never with a token in it."""
    return HubError(f"{hub} refused {repo}: {_TOKEN.sub('***', said).rstrip('.')}.")


def push_unreachable(repo: str, hub: Hub, why: str) -> HubError:
    """No network, or a hub that is down or went away half-way."""
    return HubError(
        f"{hub} could not be reached to push {repo} ({why}). Check the network and try again."
    )
