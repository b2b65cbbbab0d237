"""The recipe's ``tracking`` section."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from vlmtune.config import Config
from vlmtune.training.tracking.service import SERVICES, Mode


class TrackingConfig(Config):
    """Where a run's figures and pictures are shown, besides its own folder.

    Attributes:
        to: Services to send to. Log-in is theirs; no key is an option or is ever written.
        mode: ``online``, ``offline`` (recorded, to be sent later) or ``local`` (a dashboard on this
            machine); None: as each service is set up, and offline where nobody is logged in.
        project: The service's project; ``vlmtune`` unless given.
        name: The run's name there; the run folder's name unless given.
        workspace: The team or user whose project it is; None: the service's default.
    """

    to: tuple[Literal["swanlab", "wandb", "tensorboard", "trackio"], ...] = ()
    mode: Mode | None = None
    project: str | None = None
    name: str | None = None
    workspace: str | None = None

    @field_validator("mode")
    @classmethod
    def _is_known_to_all(cls, mode: Mode | None, info: ValidationInfo) -> Mode | None:
        for service in info.data.get("to", ()):
            modes = SERVICES[service].modes
            if mode is not None and mode not in modes:
                raise ValueError(
                    f"{service} knows {' and '.join(modes)}, not {mode}; leave tracking.mode out "
                    "to have each service as it is set up, or track to services that know it"
                )
        return mode
