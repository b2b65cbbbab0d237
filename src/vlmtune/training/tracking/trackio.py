"""trackio: a database and pictures in trackio's own folder on this machine."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import trackio
from PIL import Image

from vlmtune.training.tracking.service import PICTURES, TABLE, Opening, Shown, table

SHORT_ID = 6


class Trackio:
    """A run in trackio."""

    def __init__(self, opening: Opening) -> None:
        # Runs are told apart by name alone; two folders of one name must not become one run.
        name = f"{opening.name}-{opening.id[:SHORT_ID]}"
        self._run = trackio.init(
            project=opening.project,
            name=name,
            config=opening.hyperparameters,
            resume="allow",
            embed=False,
        )
        self.place = f"trackio show --project {opening.project} (run {name})"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, rows: Sequence[Shown]) -> None:
        """Pictures captioned with the answers, and the table with the pictures in it."""
        headings, cells = table(rows)
        pictures = [_image(row) for row in rows]
        data = [[picture, *row] for picture, row in zip(pictures, cells, strict=True)]
        shown = {TABLE: trackio.Table(columns=["image", *headings], data=data)}
        for number, picture in enumerate(pictures):
            if picture is not None:
                shown[f"{PICTURES}/{number:02d}"] = picture
        self._run.log(shown, step=step)

    def finish(self) -> None:
        """Writes what is left."""
        self._run.finish()


def _image(row: Shown) -> trackio.Image | None:
    if row.picture is None:
        return None
    return trackio.Image(Image.open(io.BytesIO(row.picture)), caption=row.prediction)
