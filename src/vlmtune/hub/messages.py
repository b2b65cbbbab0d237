"""What a hub's refusal means for the user, and what to do next."""

from __future__ import annotations

from typing import Literal, TypeAlias

from vlmtune.errors import HubError

Hub: TypeAlias = Literal["huggingface", "modelscope"]
Kind: TypeAlias = Literal["model", "dataset"]

TIMEOUT_S = 8.0  # for one answer, not for a download
_OTHER: dict[Hub, Hub] = {"huggingface": "modelscope", "modelscope": "huggingface"}


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
