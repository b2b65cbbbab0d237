"""Box notations that several families share; coordinates are the family's own integers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from vlmtune.data.boxes import Corners
from vlmtune.data.conversation import Box
from vlmtune.data.media import Size

NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
OBJECT = re.compile(r"\{[^{}]*\}")
CORNERS = re.compile(rf'"(?:bbox_2d|bbox|box)"\s*:\s*\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]')
LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.)*")')


def render_json(label: str, corners: tuple[int, int, int, int]) -> str:
    """``{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}``, as Qwen2.5-VL and Qwen3-VL write boxes."""
    fields = [f'"bbox_2d": {json.dumps(list(corners))}']
    if label:
        fields.append(f'"label": {json.dumps(label, ensure_ascii=False)}')
    return "{" + ", ".join(fields) + "}"


def parse_json(text: str) -> Iterator[tuple[str, Corners]]:
    """Every JSON object with a box in a text, whatever stands around it: label and corners."""
    for match in OBJECT.finditer(text):
        corners = CORNERS.search(match[0])
        if corners is None:
            continue
        label = LABEL.search(match[0])
        try:
            name = str(json.loads(label[1])) if label else ""
        except ValueError:  # an escape that JSON does not know: a model wrote it
            name = ""
        x1, y1, x2, y2 = (float(value) for value in corners.groups())
        yield name, (x1, y1, x2, y2)


def on_last_image(label: str, xyxy: Corners, sizes: Sequence[Size]) -> Box:
    """A box on the latest picture of a conversation."""
    return Box(image=len(sizes) - 1, label=label, xyxy=xyxy)
