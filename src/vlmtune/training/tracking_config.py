"""Where a run is shown."""

from __future__ import annotations

from typing import Literal

from vlmtune.config import Config


class TrackingConfig(Config):
    """Where a run's figures and pictures are shown, besides its own folder.

    Attributes:
        to: Services to send to. Log-in and offline mode are theirs, read from their environment.
        project: The service's project; ``vlmtune`` unless given.
        name: The run's name there; the run folder's name unless given.
    """

    to: tuple[Literal["swanlab", "wandb", "tensorboard"], ...] = ()
    project: str | None = None
    name: str | None = None
