"""Pictures that visitors show, and boxes on them: opened under the model's own image policy."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image as Opened
from PIL.Image import Resampling

from vlmtune.data.conversation import Box
from vlmtune.data.drawing import draw_boxes
from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.serving.webui.history import Picture, by_picture

LONGEST = 1280  # pixels of a preview's longer side
DRAWN = (360, 960)  # of a picture with boxes: larger, and labels shrink with it on the page
FLAT = 256 * 256  # a preview of fewer pixels is a PNG: formulas and line art stay sharp


class Pictures:
    """The previews of one page.

    Args:
        folder: Where they lie; made where it is missing, and removed by who named it.
        policy: How pictures are opened, and which are refused.
    """

    def __init__(self, folder: Path, policy: ImagePolicy) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._policy = folder, policy

    def show(self, data: bytes) -> Picture:
        """A picture from its file's bytes.

        Raises:
            ImageError: If it is damaged, too large, or no picture.
        """
        digest = hashlib.sha256(data).hexdigest()
        opened = open_image(data, self._policy)
        opened.thumbnail((LONGEST, LONGEST))
        return Picture(data, digest, self._write(opened))

    def draw(self, boxes: Sequence[Box], pictures: Sequence[Picture]) -> tuple[Path, ...]:
        """Each picture that has boxes, with its boxes on it.

        Args:
            boxes: In pixels of the upright pictures; ``Box.image`` counts ``pictures``.
            pictures: What the model was shown.

        Raises:
            ImageError: If a picture cannot be opened.
        """
        return tuple(
            self._write(self._drawn(pictures[place], own))
            for place, own in by_picture(boxes, len(pictures)).items()
        )

    def keep(self, name: str, data: bytes) -> Path:
        """Write a file."""
        path = self._folder / name
        path.write_bytes(data)
        return path

    def _drawn(self, picture: Picture, boxes: Sequence[Box]) -> Opened:
        opened = open_image(picture.data, self._policy)
        scale = display_scale(opened.size)
        if scale != 1:
            size = tuple(max(1, round(side * scale)) for side in opened.size)
            opened = opened.resize((size[0], size[1]), Resampling.LANCZOS)
        return draw_boxes(opened, [_scaled(box, scale) for box in boxes])

    def _write(self, picture: Opened) -> Path:
        """A file named by what it holds: the same picture twice is one file."""
        buffer = io.BytesIO()
        flat = picture.width * picture.height <= FLAT
        if flat:
            picture.save(buffer, "PNG")
        else:
            picture.save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
        suffix = "png" if flat else "jpg"
        return self.keep(f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix}", data)


def display_scale(size: tuple[int, int]) -> float:
    """By how much a picture is resized before boxes are drawn on it."""
    longest = max(size)
    return min(max(longest, DRAWN[0]), DRAWN[1]) / longest


def _scaled(box: Box, scale: float) -> Box:
    x1, y1, x2, y2 = box.xyxy
    return Box(box.image, box.label, (x1 * scale, y1 * scale, x2 * scale, y2 * scale))
