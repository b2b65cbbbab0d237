"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXT
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vlmtune.training.tracking.service import PICTURES, Opening, Shown

RGB = 3


class TensorBoard:
    """A run in TensorBoard. Writes its events without torch, which would take seconds to load."""

    def __init__(self, opening: Opening) -> None:
        self._writer = EventFileWriter(opening.folder)
        self.place = f"tensorboard --logdir {opening.folder}"
        shown = json.dumps(opening.hyperparameters, indent=2, ensure_ascii=False)
        if opening.resumed:
            # What the interrupted run wrote from this step on is left out by the readers.
            start = SessionLog(status=SessionLog.START)
            step, now = opening.begins, time.time()
            self._writer.add_event(Event(wall_time=now, step=step, session_log=start))
        self._add(opening.begins, _text("hyperparameters", _code(shown)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""
        self._add(step, *(Summary.Value(tag=key, simple_value=values[key]) for key in values))

    def show(self, step: int, rows: Sequence[Shown]) -> None:
        """A picture and a text a row, under one number."""
        for number, row in enumerate(rows):
            tag = f"{PICTURES}/{number:02d}"
            parts = {"row": row.id, "question": row.question, "truth": row.truth}
            parts |= {"prediction": row.prediction}
            parts |= {name: f"{score:.4g}" for name, score in row.scores.items()}
            text = "\n\n".join(f"**{name}**\n\n{_code(part)}" for name, part in parts.items())
            values = [_text(tag, text)]
            if row.picture is not None:
                values.append(_image(tag, row.picture))
            self._add(step, *values)

    def finish(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _add(self, step: int, *values: Summary.Value) -> None:
        summary = Summary(value=values)
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


def _image(tag: str, png: bytes) -> Summary.Value:
    width, height = Image.open(io.BytesIO(png)).size
    image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=png)
    return Summary.Value(tag=tag, image=image)


def _text(tag: str, text: str) -> Summary.Value:
    return Summary.Value(
        tag=f"{tag}/text",
        metadata=SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name=TEXT, content=b"")
        ),
        tensor=TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode("utf-8")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        ),
    )


def _code(text: str) -> str:
    """A text as a code block of Markdown, so that nothing in it is taken for Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
