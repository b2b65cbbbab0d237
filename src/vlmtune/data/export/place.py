"""Where an export is written: a table, its images beside it, and a report of what was lost.

    OUT/rows.json  OUT/images/*.png  OUT/lost/lost.jsonl       out is a folder
    NAME.json  NAME_images/*.png  NAME_lost.jsonl              out is a file, NAME.json

All is written into a hidden folder beside the place first. A folder then appears at once by one
rename; of a file's three the table comes last, and what a killed process had moved is taken back by
the next one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from vlmtune.data.cells import neutral
from vlmtune.data.conversation import Conversation
from vlmtune.errors import RefusedError, UsageError
from vlmtune.files import claim, holds, sync

TABLES = (".csv", ".json", ".jsonl")
MOVING = "moving.json"
# Names that Windows keeps for devices, whatever their ending.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_ENDINGS = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
_NAME_LENGTH = 80


class Place:
    """The place of an export, there whole or not at all.

    Attributes:
        table, images, report: Paths to write to now.
        images_name: How the table calls the folder of images.
        final_table, final_report: Where they will be.

    Raises:
        UsageError: ``out`` has an ending that is not the form's.
        RefusedError: Something is there already, or another process is writing it.
    """

    def __init__(self, out: Path, endings: Sequence[str]) -> None:
        # Not resolve(): a symbolic link as ``out`` is not to be followed by the final rename.
        self.out = out if out.name else out.absolute()
        ending = self.out.suffix.lower()
        self._as_file = ending in TABLES
        if self._as_file and ending not in endings:
            raise UsageError(
                f"--out {out}: this form is written as {' or '.join(endings)}; found {ending!r}"
            )
        stem = safe_name(self.out.stem) if self._as_file else ""
        self.images_name = f"{stem}_images" if stem else "images"
        names = (
            (self.images_name, f"{stem}_lost.jsonl", self.out.name)
            if self._as_file
            else (self.images_name, "lost/lost.jsonl", f"rows{endings[0]}")
        )
        self._folder = self.out.parent / f".{self.out.name}.partial"
        home = self.out.parent if self._as_file else self.out
        self.images, self.report, self.table = (self._folder / name for name in names)
        self._finals = [home / name for name in names]
        _, self.final_report, self.final_table = self._finals
        self._lost: IO[str] | None = None

    def __enter__(self) -> Self:
        lock = claim(self._folder)
        if lock is None:
            raise RefusedError(
                f"another process is exporting to {self.out} now; wait for it or choose another "
                "--out"
            )
        self._lock = lock
        try:
            self._take_back()
            self._check_free()
        except BaseException:
            self.__exit__()
            raise
        for left in self._folder.iterdir():
            _remove(left)
        return self

    def _take_back(self) -> None:
        """Remove what a process moved that was killed before it moved the table, the last."""
        if not (self._folder / MOVING).exists() or not self.table.exists():
            return
        for name in json.loads((self._folder / MOVING).read_text(encoding="utf-8")):
            if not (self._folder / name).exists():
                _remove(self.out.parent / name)

    def _check_free(self) -> None:
        if self._as_file:
            taken = [path for path in self._finals if os.path.lexists(path)]
        else:
            empty = self.out.is_dir() and not any(self.out.iterdir())
            taken = [self.out] if os.path.lexists(self.out) and not empty else []
        if taken:
            raise RefusedError(
                f"{' and '.join(map(str, taken))} {'exist' if len(taken) > 1 else 'exists'} "
                "already and would be overwritten; choose another --out, or remove the old export"
            )

    def tell(self, line: str) -> None:
        """Append a line to the report."""
        if self._lost is None:
            self.report.parent.mkdir(exist_ok=True)
            self._lost = self.report.open("w", encoding="utf-8", newline="\n")
        self._lost.write(line)

    def publish(self) -> None:
        """Move everything to its place."""
        if self._lost is not None:
            _finish(self._lost)
        sync(self._folder)
        if not self._as_file:
            self._folder.rename(self.out)
            sync(self.out.parent)
            return
        found = [path for path in (self.images, self.report, self.table) if path.exists()]
        with (self._folder / MOVING).open("w", encoding="utf-8") as file:
            json.dump([path.name for path in found], file)
            _finish(file)
        sync(self._folder)
        for path in found:
            path.rename(self.out.parent / path.name)
            sync(self.out.parent)

    def __exit__(self, *_: object) -> None:
        if self._lost is not None:
            self._lost.close()
        if holds(self._lock, self._folder):
            shutil.rmtree(self._folder)
        os.close(self._lock)


class Table:
    """Writes rows: CSV, a JSON list with a row a line, or JSON lines."""

    def __init__(self, path: Path) -> None:
        self._ending = path.suffix.lower()
        # newline="": the csv module ends its lines itself, and cells keep theirs.
        self._file = path.open("w", encoding="utf-8", newline="")
        self._csv: csv.DictWriter[str] | None = None
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, fields: Mapping[str, Any]) -> None:
        """Append a row."""
        if self._ending == ".csv":
            cells = neutral(fields)
            if self._csv is None:
                # RFC 4180's line ends: so a cell with a lone \r is quoted too.
                self._csv = csv.DictWriter(self._file, list(cells))
                self._csv.writeheader()
            self._csv.writerow(cells)
        else:
            text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
            before = "" if self._ending == ".jsonl" else ",\n" if self._rows else "[\n"
            self._file.write(before + text + ("\n" if self._ending == ".jsonl" else ""))
        self._rows += 1

    def finish(self) -> None:
        """End the table; all of it is on the disk when this returns."""
        if self._ending == ".json":
            self._file.write("\n]\n" if self._rows else "[]\n")
        _finish(self._file)


class Pictures:
    """Writes images as files, equal ones once.

    Args:
        folder: Where to write; made with the first image.
        called: How the table calls the folder.
    """

    def __init__(self, folder: Path, called: str) -> None:
        self._folder, self._called = folder, called
        self._names: dict[bytes, str] = {}  # by SHA-256
        self._taken: set[str] = set()  # in lower case: some file systems see no difference
        self._waiting: dict[bytes, tuple[str, bytes]] = {}

    def names(self, row: Conversation, formats: Sequence[str]) -> list[str]:
        """Paths of a row's images, relative to the table; ``save`` writes those that are new."""
        self._waiting = {}
        paths = []
        for image, kind in zip(row.images, formats, strict=True):
            digest = hashlib.sha256(image.data).digest()
            if digest not in self._names and digest not in self._waiting:
                ending = _ENDINGS.get(kind, f".{kind.lower()}")
                self._waiting[digest] = (self._free(safe_name(row.id), ending), image.data)
            name = self._names.get(digest) or self._waiting[digest][0]
            paths.append(f"{self._called}/{name}")
        return paths

    def _free(self, stem: str, ending: str) -> str:
        waiting = {name.lower() for name, _ in self._waiting.values()}
        name, number = stem + ending, 1
        while name.lower() in self._taken or name.lower() in waiting:
            number += 1
            name = f"{stem}-{number}{ending}"
        return name

    def save(self) -> None:
        """Write the new images of the row that ``names`` was asked about last."""
        for digest, (name, data) in self._waiting.items():
            self._folder.mkdir(exist_ok=True)
            with (self._folder / name).open("xb") as file:
                file.write(data)
                _finish(file)
            self._names[digest] = name
            self._taken.add(name.lower())
        self._waiting = {}


def safe_name(text: str) -> str:
    """A file name of ``text``: letters, digits, ``.``, ``_`` and ``-`` of ASCII only.

    Where it is not ``text`` itself, the first digits of its hash tell it from others.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text[:_NAME_LENGTH]).strip(".-")
    if safe == text and safe and not _DEVICE.match(safe):
        return safe
    return f"{safe or 'row'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finish(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
