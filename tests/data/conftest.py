from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

Encode = Callable[..., bytes]


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    return encode(Image.new("RGB", size, (number * 37 % 256, number * 11 % 256, 80)))


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``images/N.png`` and a CSV naming them; rows are replaced by position."""

    def make(
        rows: int,
        replaced: dict[int, list[str]] | None = None,
        header: Iterable[str] = ("image_path", "text"),
        name: str = "table.csv",
    ) -> Path:
        folder = tmp_path / "source"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writerow(header)
            for number in range(rows):
                (folder / f"images/{number}.png").write_bytes(picture(number))
                row = [f"images/{number}.png", f"text {number}"]
                writer.writerow((replaced or {}).get(number, row))
        return folder / name

    return make
