"""Whether the hubs answer: one short question to each, told without the keys in addresses."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2
from huggingface_hub import constants

from vlmtune.hub.messages import Hub

TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Reach:
    """What became of one question.

    Attributes:
        hub: Whom it was put to.
        place: Scheme and host of the end point; nothing of a user name or a path.
        reached: Whether anything answered; a refusal is an answer.
        seconds: Until the answer, or until it was given up.
        why: What went wrong, in a word; empty if nothing did.
    """

    hub: Hub
    place: str
    reached: bool
    seconds: float
    why: str = ""


def reach_hubs(seconds: float = TIMEOUT_S) -> list[Reach]:
    """Ask each hub whose library is installed, at the end point that its own settings name."""
    ends: dict[Hub, str] = {"huggingface": constants.ENDPOINT}
    if importlib.util.find_spec("modelscope_hub") is not None:
        import modelscope_hub

        ends["modelscope"] = str(modelscope_hub.HubConfig().endpoint)
    return [_asked(hub, end, seconds) for hub, end in ends.items()]


def is_offline() -> bool:
    """Whether the hub's own setting forbids the network."""
    return bool(constants.HF_HUB_OFFLINE)


def uses_proxy() -> bool:
    """Whether the system names a proxy; which one is nobody's business."""
    return any(scheme in getproxies() for scheme in ("http", "https", "all"))


def hub_cache() -> str:
    """The folder that models are kept in."""
    return str(constants.HF_HUB_CACHE)


def _asked(hub: Hub, end: str, seconds: float) -> Reach:
    parts = urlsplit(end)
    place = f"{parts.scheme}://{parts.hostname or ''}"
    started = time.perf_counter()
    try:
        httpx2.head(end, timeout=seconds)
    except (httpx2.TransportError, httpx2.InvalidURL, ValueError) as error:
        return Reach(hub, place, False, time.perf_counter() - started, type(error).__name__)
    return Reach(hub, place, True, time.perf_counter() - started)
