"""Box notations that several families share; coordinates are the family's own integers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from vlmtune.data.boxes import Corners, from_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import Size

NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
OBJECT = re.compile(
    # Braces within a string are a label's, e.g. LaTeX; without them where a quote is lacking.
    r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*+")*+\}|\{[^{}]*\}',
    re.DOTALL,
)
CORNERS = re.compile(rf'"(?:bbox_2d|bbox|box)"\s*:\s*\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]')
YX_CORNERS = re.compile(rf'"box_2d"\s*:\s*\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]')
FRACTION = r"\s*([01](?:\.\d{1,6})?|\.\d{1,6})\s*"
FRACTIONS = re.compile(rf"\[{FRACTION},{FRACTION},{FRACTION},{FRACTION}\]")
BETWEEN = " \t,;."  # what may stand between a box and the label of the next
LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.)*")')


def render_json(label: str, corners: tuple[int, int, int, int]) -> str:
    """``{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}``, as Qwen2.5-VL and Qwen3-VL write boxes."""
    return _object("bbox_2d", corners, label)


def render_json_yx(label: str, corners: tuple[int, int, int, int]) -> str:
    """``{"box_2d": [y1, x1, y2, x2], "label": "dog"}``, as Gemma and Gemini write boxes."""
    x1, y1, x2, y2 = corners
    return _object("box_2d", (y1, x1, y2, x2), label)


def _object(key: str, corners: tuple[int, int, int, int], label: str) -> str:
    fields = [f'"{key}": {json.dumps(list(corners))}']
    if label:
        fields.append(f'"label": {json.dumps(label, ensure_ascii=False)}')
    return "{" + ", ".join(fields) + "}"


def parse_json(text: str, pattern: re.Pattern[str] = CORNERS) -> Iterator[tuple[str, Corners]]:
    """Every JSON object with a box in a text, whatever stands around it.

    Yields:
        Labels, and the four numbers of ``pattern`` as they are written.
    """
    for match in OBJECT.finditer(text):
        corners = pattern.search(match[0])
        if corners is None:
            continue
        label = LABEL.search(match[0])
        try:
            name = str(json.loads(label[1])) if label else ""
        except ValueError:  # an escape that JSON does not know: a model wrote it
            name = ""
        x1, y1, x2, y2 = (float(value) for value in corners.groups())
        yield name, (x1, y1, x2, y2)


def json_boxes(text: str, sizes: Sequence[Size], grid: int | Size) -> list[Box]:
    """The boxes of ``parse_json``, from steps of a grid on the latest picture."""
    if not sizes:
        return []
    return [
        on_last_image(label, from_grid(corners, sizes[-1], grid), sizes)
        for label, corners in parse_json(text)
    ]


def json_yx_boxes(text: str, sizes: Sequence[Size], grid: int | Size) -> list[Box]:
    """The boxes of ``render_json_yx``, from steps of a grid on the latest picture."""
    if not sizes:
        return []
    return [
        on_last_image(label, from_grid((x1, y1, x2, y2), sizes[-1], grid), sizes)
        for label, (y1, x1, y2, x2) in parse_json(text, YX_CORNERS)
    ]


def render_fractions(label: str, thousandths: tuple[int, int, int, int]) -> str:
    """``dog: [0.123, 0.250, 0.500, 1.000]``, as the LLaVA line writes boxes."""
    corners = ", ".join(f"{value / 1000:.3f}" for value in thousandths)
    return f"{label}: [{corners}]" if label else f"[{corners}]"


def parse_fractions(text: str) -> Iterator[tuple[str, Corners]]:
    """Every ``[x1, y1, x2, y2]`` in a text with the label before it, if there is one.

    A label is what stands on the line between the box before it, or a bracket, and a colon.
    """
    start = 0
    for match in FRACTIONS.finditer(text):
        line = re.split(r"[\n\[\]]", text[start : match.start()])[-1].rstrip()
        label = line.removesuffix(":").strip(BETWEEN) if line.endswith(":") else ""
        x1, y1, x2, y2 = (float(value) for value in match.groups())
        yield label, (x1, y1, x2, y2)
        start = match.end()


def on_last_image(label: str, xyxy: Corners, sizes: Sequence[Size]) -> Box:
    """A box on the latest picture of a conversation."""
    return Box(image=len(sizes) - 1, label=label, xyxy=xyxy)
