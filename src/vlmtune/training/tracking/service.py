"""What a tracker is told, what it must be able to do, and which there are.

Imports nothing: a tracker's own process loads this and one service, and starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Mode = Literal["online", "offline", "local"]
TABLE = "predictions"  # heading of the table of predictions
PICTURES = "Prediction"  # heading of the pictures captioned with the answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a service is told when a run is opened.

    Attributes:
        project: The service's project.
        name: The run's name there.
        id: The run's identity there, the same when the run is resumed.
        resumed: Whether the run was opened before.
        begins: The first step that is told; what a resumed run told of it and of later ones before
            is told again.
        workspace: Whose project it is; None: the service's default.
        mode: Where to; None: as the service's own settings say.
        folder: Where the service may write.
        hyperparameters: What is shown beside the run.
    """

    project: str
    name: str
    id: str
    resumed: bool
    begins: int
    workspace: str | None
    mode: Mode | None
    folder: str
    hyperparameters: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A row of the table of predictions.

    Attributes:
        id: The row's id.
        question: What was asked.
        truth: The accepted answer; several are separated by lines.
        prediction: What the model said.
        scores: Metrics of this row alone.
        picture: What the model saw, as PNG, boxes drawn; None for a row without images.
    """

    id: str
    question: str
    truth: str
    prediction: str
    scores: Mapping[str, float] = field(default_factory=dict)
    picture: bytes | None = field(default=None, repr=False)


class Tracker(Protocol):
    """A run opened in a service. Lives in a process of its own; may fail and hang as it likes."""

    place: str  # where the run can be looked at: a URL or a folder

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""

    def show(self, step: int, rows: Sequence[Shown]) -> None:
        """The table of predictions at a step."""

    def finish(self) -> None:
        """Sends what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Where runs can be shown.

    Attributes:
        package: What must be installed, which is also the name of our extra.
        tracker: ``module:class``; the class is called with an ``Opening``.
        modes: Which modes it knows.
        upload: Command that sends what was recorded offline.
    """

    package: str
    tracker: str
    modes: tuple[Mode, ...]
    upload: str = ""


SERVICES: dict[str, Service] = {
    "swanlab": Service(
        package="swanlab",
        tracker="vlmtune.training.tracking.swanlab:SwanLab",
        modes=("online", "offline", "local"),
        upload='for run in {folder}/run-*; do swanlab sync --id {id} "$run"; done',
    ),
    "wandb": Service(
        package="wandb",
        tracker="vlmtune.training.tracking.wandb:Wandb",
        modes=("online", "offline"),
        upload="wandb sync --include-online {folder}/wandb/*run-*",
    ),
    "tensorboard": Service(
        package="tensorboard",
        tracker="vlmtune.training.tracking.tensorboard:TensorBoard",
        modes=("offline", "local"),
    ),
    "trackio": Service(
        package="trackio",
        tracker="vlmtune.training.tracking.trackio:Trackio",
        modes=("offline", "local"),
    ),
}


def table(rows: Sequence[Shown]) -> tuple[list[str], list[list[Any]]]:
    """Headings and cells of the table of predictions, without the pictures."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.scores))
    cells = [
        [row.id, row.question, row.truth, row.prediction, *(row.scores.get(m) for m in metrics)]
        for row in rows
    ]
    return ["id", "question", "truth", "prediction", *metrics], cells
