"""An evaluation as trackers show it: figures, and the table of predictions with its pictures."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image
from PIL.Image import Image as Picture

from vlmtune.data.conversation import Box, Conversation
from vlmtune.data.drawing import draw_boxes
from vlmtune.data.media import ImagePolicy, Size, open_image
from vlmtune.evaluation.run import Evaluation, Prediction
from vlmtune.training.tracking.service import Shown

logger = logging.getLogger(__name__)

ROWS = 16  # of the table
LONGEST = 768  # pixels of a picture's longer side
SHORTEST = 384  # of a picture with boxes, so that their labels can be read
GAP = 8  # pixels between the pictures of a row
TRUTH, ANSWER = "#2ca02c", "#ff7f0e"  # colours of boxes: green and orange


def figures(evaluation: Evaluation, heading: str) -> dict[str, float]:
    """Every metric, and the ends of its interval, under a heading."""
    values = {}
    for name, estimate in evaluation.metrics.items():
        values[f"{heading}/{name}"] = estimate.value
        values[f"{heading}/{name}_low"] = estimate.low
        values[f"{heading}/{name}_high"] = estimate.high
    return values


def shown(evaluation: Evaluation, rows: Sequence[Conversation], policy: ImagePolicy) -> list[Shown]:
    """The table of an evaluation's first rows, the same rows each time.

    Args:
        evaluation: What the model said.
        rows: The rows that were asked, in their order.
        policy: How their pictures are opened.
    """
    said = {prediction.id: prediction for prediction in evaluation.predictions}
    return [_shown(row, said[row.id], policy) for row in rows[:ROWS] if row.id in said]


def _shown(row: Conversation, prediction: Prediction, policy: ImagePolicy) -> Shown:
    return Shown(
        id=row.id,
        question=prediction.question,
        truth="\n".join(prediction.references),
        prediction=prediction.prediction,
        scores=prediction.scores,
        picture=_encoded(row, prediction, policy),
    )


def _encoded(row: Conversation, prediction: Prediction, policy: ImagePolicy) -> bytes | None:
    if not row.images:
        return None
    try:
        picture = drawn(row, prediction, policy)
    except Exception as error:  # noqa: BLE001 - no picture is worth a training
        logger.warning("row %s is shown in the trackers without its picture: %s", row.id, error)
        return None
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def drawn(row: Conversation, prediction: Prediction, policy: ImagePolicy) -> Picture:
    """A row's pictures side by side, with the true boxes in green and the predicted in orange."""
    panels = []
    for index, image in enumerate(row.images):
        picture = open_image(image.data, policy)
        panels.append(_with_boxes(picture, list(_boxes(prediction, index))))
    if len(panels) == 1:
        return panels[0]
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    canvas = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, 0))
        left += panel.width + GAP
    return canvas


def _boxes(prediction: Prediction, image: int) -> Iterator[tuple[Box, str]]:
    for box in prediction.truth:
        if box.image == image:
            yield replace(box, label=f"truth: {box.label}".removesuffix(": ")), TRUTH
    for box in prediction.boxes:
        if box.image == image:
            yield replace(box, label=box.label or "prediction"), ANSWER


def _with_boxes(picture: Picture, boxes: Sequence[tuple[Box, str]]) -> Picture:
    size = Size(*picture.size)
    scale = min(1.0, LONGEST / max(size))
    if boxes and max(size) < SHORTEST:
        scale = SHORTEST / max(size)
    shape = max(1, round(size.width * scale)), max(1, round(size.height * scale))
    scaled = picture if shape == size else picture.resize(shape, Image.Resampling.LANCZOS)
    if not boxes:
        return scaled.convert("RGB")
    across, down = shape[0] / size.width, shape[1] / size.height
    moved = [
        replace(box, xyxy=(x1 * across, y1 * down, x2 * across, y2 * down))
        for box, _ in boxes
        for x1, y1, x2, y2 in [box.xyxy]
    ]
    return draw_boxes(scaled, moved, colours=[colour for _, colour in boxes])
