"""Weights & Biases: online, or recorded for later."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb
from PIL import Image

from vlmtune.training.tracking.service import PICTURES, TABLE, Opening, Shown, table

INIT_SECONDS = 15  # after which we record offline instead
FLUSH_SECONDS = 1.0  # W&B's own 15 are lost where a server hangs at the end and we do not wait


class Wandb:
    """A run in Weights & Biases."""

    def __init__(self, opening: Opening) -> None:
        Path(opening.folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=opening.project,
            entity=opening.workspace,
            name=opening.name,
            id=opening.id,
            resume="allow",
            mode=opening.mode,
            dir=opening.folder,
            config=opening.hyperparameters,
            # Nothing of ours is on this terminal; a remote's address may hold a password.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                init_timeout=INIT_SECONDS,
                login_timeout=INIT_SECONDS,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )
        # With steps of its own it would leave out what a resumed run says of an earlier step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or opening.folder

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""
        self._run.log({**values, "step": step})

    def show(self, step: int, rows: Sequence[Shown]) -> None:
        """Pictures captioned with the answers, and the table with the pictures in it."""
        pictures = [
            None
            if row.picture is None
            else wandb.Image(Image.open(io.BytesIO(row.picture)), caption=row.prediction)
            for row in rows
        ]
        headings, cells = table(rows)
        data = [[picture, *row] for picture, row in zip(pictures, cells, strict=True)]
        shown = {TABLE: wandb.Table(columns=["image", *headings], data=data), "step": step}
        present = [picture for picture in pictures if picture is not None]
        self._run.log({**shown, PICTURES: present} if present else shown)

    def finish(self) -> None:
        """Sends what is left."""
        self._run.finish()
