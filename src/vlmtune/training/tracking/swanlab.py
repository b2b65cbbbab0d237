"""SwanLab: in its cloud, in a dashboard on this machine, or recorded for later."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import swanlab
from PIL import Image

from vlmtune.training.tracking.service import PICTURES, TABLE, Opening, Shown, table


class SwanLab:
    """A run in SwanLab."""

    def __init__(self, opening: Opening) -> None:
        if opening.mode == "local" and importlib.util.find_spec("swanboard") is None:
            # SwanLab would only note it in its log, and show nothing.
            raise RuntimeError("mode local needs its dashboard: pip install 'swanlab[dashboard]'")
        Path(opening.folder).mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            project=opening.project,
            workspace=opening.workspace,
            name=opening.name,
            id=opening.id,
            resume="allow",
            mode=opening.mode,
            log_dir=opening.folder,
            config=opening.hyperparameters,
            settings=swanlab.Settings(
                interactive=False,
                # A remote's address may hold a password; command and terminal are not the user's.
                probe=swanlab.Settings.Probe(git=False, runtime=False),
                terminal=swanlab.Settings.Terminal(proxy_type="none"),
            ),
        )
        watch = f"swanlab watch {opening.folder}"
        places = {"online": lambda: self._run.url, "local": lambda: watch}
        self.place = places.get(self._run.mode, lambda: opening.folder)()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, rows: Sequence[Shown]) -> None:
        """Pictures captioned with the answers; the table, where the dashboard can show one."""
        pictures = [
            swanlab.Image(Image.open(io.BytesIO(row.picture)), caption=row.prediction)
            for row in rows
            if row.picture is not None
        ]
        if pictures:
            self._run.log({PICTURES: pictures}, step=step)
        headings, cells = table(rows)
        if self._run.mode == "local":  # knows lines, pictures and texts
            texts = [
                swanlab.Text(f"prediction: {row.prediction}\ntruth: {row.truth}", caption=row.id)
                for row in rows
            ]
            self._run.log({TABLE: texts}, step=step)
        else:
            self._run.log({TABLE: swanlab.echarts.Table().add(headings, cells)}, step=step)

    def finish(self) -> None:
        """Sends what is left."""
        self._run.finish()
